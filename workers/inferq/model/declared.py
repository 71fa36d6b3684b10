"""Reads what a model's class says of its inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from inferq.model.base import Model
from inferq.shared.errors import ConfigError
from inferq.shared.schema import DTYPES, MAX_DIMS, MAX_TENSORS, Signature, TensorSpec

_SPEC: Final = re.compile(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*")
_SYMBOL: Final = re.compile(r"[A-Za-z_]\w{0,63}")
_SIZE: Final = re.compile(r"[0-9]{1,9}")
_FORM: Final = 'dtype[dims], as in "float32[batch, 3, 224]"'


def signature_of(cls: type[Model]) -> Signature:
    """The signature of `cls`. ConfigError naming class, attribute, value and expectation."""
    name = cls.__name__
    if cls.run is Model.run:
        raise ConfigError(f"class {name} has no run; expected def run(self, inputs)")
    return Signature(_specs(f"{name}.inputs", cls.inputs), _specs(f"{name}.outputs", cls.outputs))


def _specs(where: str, declared: object) -> tuple[TensorSpec, ...]:
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{where} is {declared!r:.100}; expected a dict of name: {_FORM}")
    if not 1 <= len(declared) <= MAX_TENSORS:
        raise ConfigError(f"{where} has {len(declared)} entries; expected 1 to {MAX_TENSORS}")
    return tuple(_spec(where, name, text) for name, text in declared.items())


def _spec(where: str, name: object, text: object) -> TensorSpec:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where} has the key {name!r:.100}; expected a name")
    place = f"{where}[{name!r:.100}] is {text!r:.100}"
    match = _SPEC.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{place}; expected {_FORM}")
    dtype, inner = match.groups()
    if dtype not in DTYPES:
        raise ConfigError(f"{place}; expected one of the dtypes {', '.join(DTYPES)}")
    dims = [dim.strip() for dim in inner.split(",")] if inner.strip() else []
    if len(dims) > MAX_DIMS:
        raise ConfigError(f"{place}; expected at most {MAX_DIMS} dims")
    return TensorSpec(name, dtype, tuple(_dim(place, dim) for dim in dims))


def _dim(place: str, dim: str) -> int | str | None:
    if dim == "?":
        return None
    if _SIZE.fullmatch(dim):
        return int(dim)
    if _SYMBOL.fullmatch(dim):
        return dim
    raise ConfigError(f"{place}, with the dim {dim!r}; expected a size, a name or ?")
