"""Which shapes a plan is built for: by ``[profile]``, ``[pad]`` and batch knobs of model.toml.

A profile gives each symbol of the signature three sizes: the smallest, the one that TensorRT
optimises for, and the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from inferq.shared.errors import ConfigError
from inferq.shared.schema import TensorSpec
from inferq.workers.repository import ModelSpec
from inferq.workers.trt.flavours import InputRange
from inferq.workers.validation import MAX_BATCH_SIZE

#: The smallest, the best and the largest size of one symbol.
Sizes = tuple[int, int, int]

#: Elements of one input at its largest: TensorRT's own limit.
MAX_ELEMENTS: Final = (1 << 31) - 1


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


def symbol_sizes(spec: ModelSpec, batch: Sizes | None = None) -> dict[str, Sizes]:
    """The sizes of each symbol of the inputs of `spec`; `batch` wins over model.toml.

    Raises ConfigError: nothing says how large a symbol is, or what says it does not fit what the
    other knobs let pass.
    """
    if batch is not None and not spec.batchable:
        raise ConfigError(
            f"--batch is {','.join(map(str, batch))}; expected none, "
            f"since the model is not batchable: {spec.why_not_batchable}"
        )
    found: dict[str, Sizes] = {}
    for tensor in spec.signature.inputs:
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str):
                found.setdefault(dim, _sizes(spec, dim, batch))
            elif dim is None:
                raise ConfigError(
                    f"dim {axis} of input {tensor} has no name, so that [profile] cannot give its "
                    "sizes; expected a fixed size or a symbol: name it in the ONNX file"
                )
    return found


def input_ranges(spec: ModelSpec, sizes: Mapping[str, Sizes]) -> tuple[InputRange, ...]:
    """The shapes of all inputs of `spec`, open dims or not. ConfigError if one is too large."""
    return tuple(_range(tensor, sizes) for tensor in spec.signature.inputs)


def open_ranges(spec: ModelSpec, ranges: Sequence[InputRange]) -> tuple[InputRange, ...]:
    """Those of `ranges` whose inputs have open dims: what TensorRT wants to be told."""
    fixed = {
        tensor.name
        for tensor in spec.signature.inputs
        if all(isinstance(dim, int) for dim in tensor.shape)
    }
    return tuple(span for span in ranges if span.name not in fixed)


def as_toml(sizes: Mapping[str, Sizes]) -> str:
    """`sizes` as the ``[profile]`` that gives them."""
    return "\n".join(["[profile]", *(f"{_key(name)} = {list(of)}" for name, of in sizes.items())])


def _key(symbol: str) -> str:
    bare = symbol.isascii() and symbol.replace("_", "").replace("-", "").isalnum()
    return symbol if bare else '"' + symbol.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _sizes(spec: ModelSpec, symbol: str, batch: Sizes | None) -> Sizes:
    config = spec.config
    is_batch = symbol == spec.signature.batch_symbol
    if is_batch and batch is not None:
        _check(f"--batch is {','.join(map(str, batch))}", batch, 1, 0)
        return batch
    given = config.profile.get(symbol)
    pad = config.pad.get(symbol)
    if given is not None:
        where = f"profile.{symbol} is {list(given)}"
        if is_batch:
            _check(where, given, config.buckets[0] if config.buckets else 1, _largest_batch(spec))
        elif pad is not None:
            _check(where, given, pad.buckets[0], pad.buckets[-1])
        return given
    if is_batch:
        preferred, most = config.preferred_batch_sizes, _largest_batch(spec)
        return 1, preferred[-1] if preferred else most, most
    if pad is not None:
        return pad.buckets[0], pad.buckets[-1], pad.buckets[-1]
    raise ConfigError(
        f"nothing says how large {symbol!r} of the inputs may be; expected in model.toml: "
        f"[profile] {_key(symbol)} = [smallest, usual, largest]"
    )


def _largest_batch(spec: ModelSpec) -> int:
    """The size at which a batch of max_batch_size runs: that of its bucket."""
    most = spec.max_batch_size
    return next((size for size in spec.config.buckets if size >= most), most)


def _check(where: str, sizes: Sizes, least: int, most: int) -> None:
    if sizes[0] > least:
        raise ConfigError(f"{where}; expected the first to be at most {least}, which can occur")
    if sizes[2] < most:
        raise ConfigError(f"{where}; expected the last to be at least {most}, which can occur")


def _range(tensor: TensorSpec, sizes: Mapping[str, Sizes]) -> InputRange:
    shapes = [
        tuple(sizes[dim][n] if isinstance(dim, str) else int(dim or 0) for dim in tensor.shape)
        for n in range(3)
    ]
    elements = int(np.prod(shapes[2], dtype=np.float64))
    if elements > MAX_ELEMENTS:
        raise ConfigError(
            f"input {tensor} has {elements} elements at its largest, {list(shapes[2])}; "
            f"expected at most {MAX_ELEMENTS}: lower max_batch_size or the sizes in [profile]"
        )
    return InputRange(tensor.name, *shapes)
