"""TensorRT's optimization profiles: what `ranges` says, as builders and people take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inferq.shared.errors import ConfigError
from inferq.workers.models.ranges import InputRange, Sizes, toml_key
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import MAX_BATCH_SIZE


def parse_batch(text: str) -> Sizes:
    """``1,8,64`` as sizes of the batch. ConfigError."""
    try:
        least, best, most = (int(part) for part in text.split(","))
    except ValueError:
        least, best, most = 0, 0, 0
    if not 1 <= least <= best <= most <= MAX_BATCH_SIZE:
        raise ConfigError(
            f"--batch is {text!r}; expected three ascending sizes from 1 to {MAX_BATCH_SIZE}, "
            "as 1,8,64"
        )
    return least, best, most


def open_ranges(spec: ModelSpec, ranges: Sequence[InputRange]) -> tuple[InputRange, ...]:
    """Those of `ranges` whose inputs have open dims: what TensorRT wants to be told."""
    fixed = {
        tensor.name
        for tensor in spec.signature.inputs
        if all(isinstance(dim, int) for dim in tensor.shape)
    }
    return tuple(span for span in ranges if span.name not in fixed)


def as_toml(profiles: Sequence[Mapping[str, Sizes]]) -> str:
    """The ``[profile]``, or the ``[[profile]]``s, that give these `profiles`."""
    head = "[profile]" if len(profiles) == 1 else "[[profile]]"
    return "\n".join(
        line
        for sizes in profiles
        for line in (head, *(f"{toml_key(name)} = {list(of)}" for name, of in sizes.items()))
    )
