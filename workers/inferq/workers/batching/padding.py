"""Pads the dims that model.toml's ``[pad]`` names, so that more requests fit together.

Only named symbols of input dims other than the batch are ever padded, up to the next of their
buckets; outputs that have the symbol are cut back to the request's own size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inferq.shared.errors import InvalidInput
from inferq.shared.schema import Array, Signature, Tensors


@dataclass(frozen=True)
class PadRule:
    """One symbol's allowed sizes, ascending, and what stands in the padding."""

    buckets: tuple[int, ...]
    value: float


class Padding:
    """The ``[pad]`` table of one model, applied to its signature."""

    def __init__(self, signature: Signature, rules: Mapping[str, PadRule]) -> None:
        self._rules = rules
        self._inputs = {spec.name: spec.shape for spec in signature.inputs}
        self._outputs = {spec.name: spec.shape for spec in signature.outputs}

    def apply(self, arrays: Tensors) -> tuple[dict[str, Array], Mapping[str, int] | None]:
        """The padded inputs, and each padded symbol's size before. InvalidInput: over the last."""
        if not self._rules:
            return dict(arrays), None
        sizes: dict[str, int] = {}
        padded: dict[str, Array] = {}
        for name, array in arrays.items():
            widths = [(0, 0)] * array.ndim
            values = [(0.0, 0.0)] * array.ndim
            for axis, symbol in enumerate(self._inputs[name]):
                rule = self._rules.get(symbol) if isinstance(symbol, str) and axis else None
                if rule is None or not isinstance(symbol, str):
                    continue
                size = array.shape[axis]
                bucket = next((b for b in rule.buckets if b >= size), None)
                if bucket is None:
                    raise InvalidInput(
                        f"input {name!r}: dim {axis} ({symbol}) is {size}; "
                        f"expected at most {rule.buckets[-1]}"
                    )
                sizes[symbol] = size
                widths[axis] = (0, bucket - size)
                values[axis] = (0.0, rule.value)
            grows = any(after for _, after in widths)
            padded[name] = np.pad(array, widths, constant_values=values) if grows else array
        return padded, sizes

    def cut(self, outputs: Tensors, sizes: Mapping[str, int] | None) -> Tensors:
        """`outputs` of one request without what padding added."""
        if not sizes:
            return outputs
        return {name: self._cut_one(name, array, sizes) for name, array in outputs.items()}

    def _cut_one(self, name: str, array: Array, sizes: Mapping[str, int]) -> Array:
        dims = self._outputs.get(name, ())
        keep = tuple(
            slice(sizes[dim]) if axis and isinstance(dim, str) and dim in sizes else slice(None)
            for axis, dim in enumerate(dims)
        )
        cut: Array = array[keep]
        return cut
