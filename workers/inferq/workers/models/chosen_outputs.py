"""The outputs of a model that model.toml names; the others are neither served nor computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from msgspec.structs import replace as changed

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Tensors
from inferq.workers.models.engine import Batch, Lane, LoadedModel
from inferq.workers.models.lane_wrapper import WrappedLane, in_each
from inferq.workers.models.signatures import Declared


def choose(declared: Declared, outputs: Sequence[str]) -> Declared:
    """`declared` with none but these `outputs`; all, if there are none.

    ConfigError: there is no such output, or one that is left cannot be served.
    """
    known = {spec.name: spec for spec in declared.signature.outputs}
    for name in outputs or declared.unserved:
        if name in declared.unserved:
            hint = (
                f"; outputs = [{', '.join(map(_quoted, known))}] in model.toml leaves it out"
                if not outputs and known
                else ""
            )
            raise ConfigError(declared.unserved[name] + hint)
        if name not in known:
            names = ", ".join([*known, *declared.unserved])
            raise ConfigError(f"outputs has {name!r}; expected names of its outputs: {names}")
    if not outputs or list(outputs) == list(known):
        return declared
    probe = declared.probe

    def chosen(inputs: Tensors) -> Mapping[str, Array]:
        assert probe is not None
        found = probe(inputs)
        return {name: found[name] for name in outputs}

    specs = tuple(known[name] for name in outputs)
    signature = changed(declared.signature, outputs=specs)
    return replace(declared, signature=signature, probe=probe and chosen)


def _quoted(name: str) -> str:
    return f'"{name}"'


class _Chosen(WrappedLane):
    """A lane of an engine that computes all outputs."""

    def __init__(self, lane: Lane, names: Sequence[str]) -> None:
        super().__init__(lane)
        self._names = names

    def run(self, batch: Batch) -> Mapping[str, Array]:
        found = self._lane.run(batch)
        return {name: found[name] for name in self._names if name in found}


def chosen_lanes(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, whose lanes give no outputs but those that model.toml names."""
    names = loaded.spec.config.outputs
    if not names:
        return loaded
    return in_each(loaded, lambda lane: _Chosen(lane, names))
