"""How large the open dims of a model's inputs may be: by ``[profile]``, ``[pad]`` and batch knobs.

A profile gives each symbol of the signature three sizes: the smallest, the optimum, for which an
engine is tuned, and the largest. model.toml may hold one, ``[profile]``, or several,
``[[profile]]``. For a symbol that a profile leaves out, the batch knobs and ``[pad]`` give the
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.schema import TensorSpec
from inferq.workers.models.signatures import how_to_name
from inferq.workers.models.spec import ModelSpec

Shape = tuple[int, ...]
#: The smallest, the optimum and the largest size of one symbol.
Sizes = tuple[int, int, int]

#: Elements of one input at its largest: TensorRT's own limit.
MAX_ELEMENTS: Final = (1 << 31) - 1


@dataclass(frozen=True)
class InputRange:
    """The shapes of one input in a profile."""

    name: str
    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        """Whether the profile includes `shape`."""
        return len(shape) == len(self.min) and all(
            least <= size <= most
            for least, size, most in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class Optimum:
    """The inputs at the optimum of one profile."""

    #: Symbol → its optimum size, for all symbols.
    sizes: Mapping[str, int]
    #: The largest batch.
    rows: int


def profile_sizes(spec: ModelSpec, batch: Sizes | None = None) -> tuple[dict[str, Sizes], ...]:
    """For each profile, the smallest first: symbol of the inputs of `spec` → its sizes.

    `batch` wins over model.toml in all of them. ConfigError if nothing says how large a symbol is,
    or if its sizes do not fit what the other knobs permit.
    """
    if batch is not None and not spec.batchable:
        raise ConfigError(
            f"--batch is {','.join(map(str, batch))}; expected none, "
            f"since the model is not batchable: {spec.why_not_batchable}"
        )
    profiles: list[dict[str, Sizes]] = [{} for _ in spec.config.profile or ({},)]
    for symbol in _symbols(spec):
        for table, sizes in zip(spec.config.profile or ({},), profiles, strict=True):
            sizes[symbol] = _sizes(spec, table, symbol, batch)
        _check(spec, symbol, [sizes[symbol] for sizes in profiles], batch)
    # With --batch, profiles may become equal.
    found = [sizes for n, sizes in enumerate(profiles) if sizes not in profiles[:n]]
    return tuple(sorted(found, key=lambda sizes: _elements(spec, sizes)))


def input_ranges(spec: ModelSpec, sizes: Mapping[str, Sizes]) -> tuple[InputRange, ...]:
    """The shapes of all inputs of `spec` in one profile, with or without open dims.

    ConfigError if one is too large.
    """
    return tuple(_range(tensor, sizes) for tensor in spec.signature.inputs)


def optimum_inputs(spec: ModelSpec) -> tuple[Optimum, ...]:
    """The optimum of each profile of `spec`, largest batches first. ConfigError as above."""
    batch = spec.batch_symbol
    found = [
        Optimum(
            {symbol: optimum for symbol, (_, optimum, _) in sizes.items()},
            1 if batch is None else sizes[batch][2],
        )
        for sizes in profile_sizes(spec)
    ]
    return tuple(sorted(found, key=lambda each: -each.rows))


def given_optimum_inputs(spec: ModelSpec) -> tuple[Optimum, ...]:
    """The same for an engine that takes any shape; empty if ``[profile]`` lacks some sizes."""
    try:
        return optimum_inputs(spec) if spec.config.profile else ()
    except ConfigError:  # only an engine that is built for its profiles needs all sizes
        return ()


def _symbols(spec: ModelSpec) -> list[str]:
    found: dict[str, None] = {}
    for tensor in spec.signature.inputs:
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str):
                found[dim] = None
            elif dim is None:
                raise ConfigError(
                    f"nothing says how large dim {axis} of input {tensor} may be, and [profile] "
                    f"takes names only; {how_to_name(tensor.name, axis)}"
                )
    return list(found)


def _sizes(spec: ModelSpec, table: Mapping[str, Sizes], symbol: str, batch: Sizes | None) -> Sizes:
    config = spec.config
    is_batch = symbol == spec.batch_symbol
    if is_batch and batch is not None:
        return batch
    if symbol in table:
        return table[symbol]
    if is_batch:
        preferred, most = config.preferred_batch_sizes, _largest_batch(spec)
        return 1, preferred[-1] if preferred else most, most
    if symbol in config.pad:
        buckets = config.pad[symbol].buckets
        return buckets[0], buckets[-1], buckets[-1]
    raise ConfigError(
        f"nothing says how large {symbol!r} of the inputs may be; expected in model.toml: "
        f"[profile] {toml_key(symbol)} = [smallest, optimum, largest]"
    )


def toml_key(symbol: str) -> str:
    """`symbol` as a key of a TOML table."""
    bare = symbol.isascii() and symbol.replace("_", "").replace("-", "").isalnum()
    return symbol if bare else '"' + symbol.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _largest_batch(spec: ModelSpec) -> int:
    """The size at which a batch of max_batch_size runs: its bucket."""
    most = spec.max_batch_size
    return next((size for size in spec.config.buckets if size >= most), most)


def _check(spec: ModelSpec, symbol: str, given: list[Sizes], batch: Sizes | None) -> None:
    """ConfigError unless each size of `symbol` that can occur is within one of those `given`."""
    config = spec.config
    where = f"profile.{symbol} is {' and '.join(str(list(sizes)) for sizes in given)}"
    of = " of one" if len(given) > 1 else ""
    occurring: tuple[int, ...] = ()
    if symbol == spec.batch_symbol:
        # Sizes in between are padded to a larger batch, or split.
        occurring = (config.buckets[0] if config.buckets else 1, _largest_batch(spec))
        if batch is not None:
            where = f"--batch is {','.join(map(str, batch))}"
            occurring = (1,)
    elif symbol in config.pad:
        occurring = config.pad[symbol].buckets
    if not occurring:
        return
    if min(sizes[0] for sizes in given) > occurring[0]:
        raise ConfigError(
            f"{where}; expected the first{of} to be at most {occurring[0]}, which can occur"
        )
    if max(sizes[2] for sizes in given) < occurring[-1]:
        raise ConfigError(
            f"{where}; expected the last{of} to be at least {occurring[-1]}, which can occur"
        )
    if symbol in config.pad:
        for size in occurring:
            if not any(least <= size <= most for least, _, most in given):
                raise ConfigError(f"{where}; expected one to hold {size}, which can occur")


def _elements(spec: ModelSpec, sizes: Mapping[str, Sizes]) -> int:
    """Elements of all inputs at their largest."""
    return sum(math.prod(_shape(tensor, sizes, 2)) for tensor in spec.signature.inputs)


def _shape(tensor: TensorSpec, sizes: Mapping[str, Sizes], which: int) -> Shape:
    return tuple(
        sizes[dim][which] if isinstance(dim, str) else int(dim or 0) for dim in tensor.shape
    )


def _range(tensor: TensorSpec, sizes: Mapping[str, Sizes]) -> InputRange:
    least, optimum, most = (_shape(tensor, sizes, which) for which in range(3))
    elements = math.prod(most)
    if elements > MAX_ELEMENTS:
        raise ConfigError(
            f"input {tensor} has {elements} elements at its largest, {list(most)}; "
            f"expected at most {MAX_ELEMENTS}: lower max_batch_size or the sizes in [profile]"
        )
    return InputRange(tensor.name, least, optimum, most)
