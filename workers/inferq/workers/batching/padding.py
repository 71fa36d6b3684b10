"""Pads the dims that model.toml's ``[pad]`` names, so that more requests fit together.

Only named symbols of input dims other than the first are ever padded, up to the next of their
buckets. What padding adds to the outputs is cut off again. How much that is was measured
(`pad_probe`), whatever the file calls the dims.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import EllipsisType
from typing import Final

import numpy as np

from inferq.shared.errors import InvalidInput
from inferq.shared.schema import Array, Signature, Tensors, TensorSpec, is_text
from inferq.shared.text import TEXT
from inferq.workers.batching.growth import Grid, Growth

#: Number of request sizes whose cuts are remembered.
_REMEMBERED: Final = 4096

_Cut = tuple[slice | EllipsisType, ...]


@dataclass(frozen=True)
class PadRule:
    """One symbol's allowed sizes, ascending, and the value of the padding."""

    buckets: tuple[int, ...]
    #: For every input that has the symbol; or by input, 0 for an input without a value.
    value: float | Mapping[str, float]

    def value_in(self, name: str) -> float:
        """The value of the padding in the input `name`."""
        return self.value.get(name, 0) if isinstance(self.value, Mapping) else self.value

    def bucket(self, size: int) -> int | None:
        """The smallest allowed size that holds `size`."""
        place = bisect_left(self.buckets, size)
        return self.buckets[place] if place < len(self.buckets) else None


def padded_dims(spec: TensorSpec, rules: Mapping[str, PadRule]) -> list[tuple[int, str]]:
    """The axes of an input that are padded, each with its symbol."""
    return [
        (axis, dim)
        for axis, dim in enumerate(spec.shape)
        if axis and isinstance(dim, str) and dim in rules
    ]


@dataclass(frozen=True)
class Measured:
    """How a model's outputs were measured to depend on the padded dims."""

    #: Symbol → the sizes that the model takes; a missing symbol may have any size.
    grids: Mapping[str, Grid] = field(default_factory=dict)
    #: Output → axis → the symbol by which it grows, and how.
    growths: Mapping[str, Mapping[int, tuple[str, Growth]]] = field(default_factory=dict)
    #: Groups of symbols that must have the same size.
    tied: Sequence[Sequence[str]] = ()


class Padding:
    """The ``[pad]`` table of one model, applied to its signature."""

    def __init__(
        self,
        signature: Signature,
        rules: Mapping[str, PadRule],
        measured: Measured | None = None,
    ) -> None:
        self._rules = rules
        self._measured = measured or Measured()
        dims = {spec.name: padded_dims(spec, rules) for spec in signature.inputs}
        self._inputs = {name: axes for name, axes in dims.items() if axes}
        #: What stands in the padding of inputs of text.
        self._empty = {
            spec.name: TEXT[spec.dtype]() for spec in signature.inputs if is_text(spec.dtype)
        }
        self._cuts = lru_cache(maxsize=_REMEMBERED)(self._find_cuts)

    def apply(self, arrays: Tensors) -> tuple[dict[str, Array], Mapping[str, int] | None]:
        """The padded inputs, and each padded symbol's size before.

        InvalidInput: larger than the last bucket, or a size that the model does not take.
        """
        if not self._inputs:
            return dict(arrays), None
        padded = dict(arrays)
        sizes: dict[str, int] = {}
        for name, axes in self._inputs.items():
            array = arrays[name]
            shape = list(array.shape)
            for axis, symbol in axes:
                sizes[symbol] = size = shape[axis]
                shape[axis] = self._bucket(name, axis, symbol, size)
            if array.shape != tuple(shape):
                values = [(axis, self._value(name, symbol)) for axis, symbol in axes]
                padded[name] = _filled_up(array, shape, values)
        for symbols in self._measured.tied:
            if len({sizes[symbol] for symbol in symbols}) > 1:
                given = ", ".join(f"{symbol} {sizes[symbol]}" for symbol in symbols)
                raise InvalidInput(f"sizes are {given}; expected one size, as the model takes")
        return padded, sizes

    def _value(self, name: str, symbol: str) -> float | str | bytes:
        return self._empty[name] if name in self._empty else self._rules[symbol].value_in(name)

    def _bucket(self, name: str, axis: int, symbol: str, size: int) -> int:
        if not size:  # nothing but padding would be left, which no comparison has tried
            raise InvalidInput(
                f"input {name!r}: dim {axis} ({symbol}) is 0; expected at least 1, as it is padded"
            )
        rule = self._rules[symbol]
        bucket = rule.bucket(size)
        if bucket is None:
            raise InvalidInput(
                f"input {name!r}: dim {axis} ({symbol}) is {size}; "
                f"expected at most {rule.buckets[-1]}"
            )
        grid = self._measured.grids.get(symbol)
        if grid is not None and size not in grid:
            raise InvalidInput(
                f"input {name!r}: dim {axis} ({symbol}) is {size}; expected {grid}, "
                "as the model takes no other, padded or not"
            )
        return bucket

    def cut(self, outputs: Tensors, sizes: Mapping[str, int] | None) -> Tensors:
        """`outputs` of one request without what padding added."""
        if not sizes:
            return outputs
        cuts = self._cuts(tuple(sizes.items()))
        if not cuts:
            return outputs
        return {
            name: array[cuts[name]] if name in cuts else array for name, array in outputs.items()
        }

    def _find_cuts(self, sizes: tuple[tuple[str, int], ...]) -> dict[str, _Cut]:
        """Output → the slices to keep, for outputs of which not all is kept."""
        size_of = dict(sizes)
        cuts: dict[str, _Cut] = {}
        for name, growths in self._measured.growths.items():
            keep: list[slice | EllipsisType] = [slice(None)] * (max(growths, default=-1) + 1)
            for axis, (symbol, growth) in growths.items():
                size = size_of[symbol]
                bucket = self._rules[symbol].bucket(size)
                # Cut off what was added: the rest of the dim may depend on another size, too.
                added = growth.at(bucket or size) - growth.at(size)
                if added:
                    keep[axis] = slice(None, -added)
            if any(each != slice(None) for each in keep):
                cuts[name] = (*keep, ...)
        return cuts


def _filled_up(
    array: Array, shape: Sequence[int], values: Sequence[tuple[int, float | str | bytes]]
) -> Array:
    """`array` in the beginning of one of `shape`; behind it, along each axis, its value.

    Where several axes are filled up, the value of the last one counts.
    """
    whole: Array = np.empty(shape, array.dtype)
    place = [slice(size) for size in array.shape]
    whole[tuple(place)] = array
    for axis, value in values:
        size = array.shape[axis]
        if shape[axis] > size:
            place[axis] = slice(size, None)
            whole[tuple(place)] = value
        place[axis] = slice(None)
    return whole
