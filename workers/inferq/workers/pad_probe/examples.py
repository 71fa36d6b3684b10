"""Inputs on which padded and unpadded runs of a model are compared.

The meaning of inputs is not known, so several kinds are tried; inputs that the model rejects show
nothing. Integers are small, so that they are valid as indices. An input that may be a mask shows
all places, or hides some of them, but never the first: with a mask that hides everything a model
may answer anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from inferq.shared.schema import DTYPES, Array, Signature, TensorSpec, is_text
from inferq.workers.batching.padding import PadRule, padded_dims
from inferq.workers.row_probe.examples import texts

#: No example holds more input elements than this: 256 MB of float32.
MAX_ELEMENTS: Final = 1 << 26
#: If 0 and 1 are valid, integers below this are taken to be valid, too, until the model rejects
#: them.
_WORDS: Final = 50

#: Symbol → size of each open dim; None → size of those without a name.
Sizes = Mapping[str | None, int]
_Floats = Callable[[np.random.Generator, Sequence[int]], Array]


@dataclass(frozen=True)
class Example:
    """One kind of inputs."""

    #: In words: ``random values``.
    kind: str
    floats: _Floats
    #: No place is masked, and all integers are equal.
    all_there: bool = False
    #: The input with other integers than 0 and 1, and whether some are negative.
    words: str = ""
    signed: bool = False
    #: Integers of unpadded inputs are the padded dim's size instead of 0 and 1.
    lengths: bool = False
    #: All values of an input are the same: then rounding decides which index an output names.
    level: bool = False


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    return rng.standard_normal(shape)


_RANDOM: Final = Example("random values", _normal, all_there=True)
_MASKED: Final = Example("random values, some of them masked", _normal)
_FLOATS: Final = (
    Example("negative values", lambda rng, shape: -0.1 - rng.random(shape), all_there=True),
    Example("values from 0 to 1", lambda rng, shape: rng.random(shape), all_there=True),
    Example(
        "values half of which are 0",
        lambda rng, shape: rng.standard_normal(shape) * rng.integers(0, 2, shape),
        all_there=True,
    ),
    Example("large values", lambda rng, shape: 30 * rng.standard_normal(shape), all_there=True),
    Example("small values", lambda rng, shape: 1e-3 * rng.standard_normal(shape), all_there=True),
    Example("zeros", lambda _, shape: np.zeros(shape), all_there=True, level=True),
)
_ONES: Final = Example("ones", lambda _, shape: np.ones(shape), all_there=True, level=True)


class Examples:
    """The examples for one model, by what each of its inputs may mean."""

    def __init__(self, signature: Signature, rules: Mapping[str, PadRule]) -> None:
        self._signature = signature
        self._rules = rules
        self._padded = {spec.name: padded_dims(spec, rules) for spec in signature.inputs}
        self._masks = self._find_masks()

    def kinds(self) -> list[Example]:
        """The most telling ones first."""
        specs = self._signature.inputs
        words = [
            spec.name
            for spec in specs
            if _kind(spec) in "iu" and self._padded[spec.name] and spec.name not in self._masks
        ]
        lone = sum(map(bool, self._padded.values())) == 1
        found = [_RANDOM, *([_MASKED] if self._masks or words else [])]
        found += [_FLOATS[0]] if any(_kind(spec) in "fc" for spec in specs) else []
        for name in words:
            found.append(Example("random integers", _normal, all_there=True, words=name))
            if lone and _kind_of(specs, name) == "i":
                kind = "random integers of both signs"
                found.append(Example(kind, _normal, all_there=True, words=name, signed=True))
        if any(_kind(spec) in "iu" and not self._padded[spec.name] for spec in specs):
            kind = "random values, and the padded dim's size where an integer is asked"
            found.append(Example(kind, _normal, all_there=True, lengths=True))
        found += _FLOATS[1:] if any(_kind(spec) in "fc" for spec in specs) else []
        return [*found, _ONES]

    def inputs(self, example: Example, sizes: Sizes, seed: int = 0) -> dict[str, Array] | None:
        """One row of inputs, always the same for the same arguments.

        None: it would be too large.
        """
        rng = np.random.default_rng(seed)
        shapes = {
            spec.name: [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
            for spec in self._signature.inputs
        }
        if sum(map(math.prod, shapes.values())) > MAX_ELEMENTS:
            return None
        return {
            spec.name: self._values(example, spec, shapes[spec.name], sizes, rng).astype(
                DTYPES[spec.dtype]
            )
            for spec in self._signature.inputs
        }

    def _values(
        self,
        example: Example,
        spec: TensorSpec,
        shape: Sequence[int],
        sizes: Sizes,
        rng: np.random.Generator,
    ) -> Array:
        padded = self._padded[spec.name]
        if is_text(spec.dtype):
            return texts(spec.dtype, shape, None if example.level else rng)
        if spec.name in self._masks:
            return self._mask(spec.name, shape, None if example.all_there or not padded else rng)
        if _kind(spec) in "fc":
            return example.floats(rng, shape)
        if example.lengths and not padded and _kind(spec) != "b":
            return np.full(shape, min(sizes[symbol] for symbol in self._rules))
        if example.words == spec.name:
            top = 256 if spec.dtype == "uint8" else _WORDS
            return rng.integers(-top if example.signed else 0, top, shape)
        if example.level or example.words:
            return self._mask(spec.name, shape, None)
        return self._mask(spec.name, shape, rng) if padded else rng.integers(0, 2, shape)

    def _mask(self, name: str, shape: Sequence[int], rng: np.random.Generator | None) -> Array:
        """Values other than the padding's; with `rng`, some places have the padding's value."""
        symbols = [symbol for _, symbol in self._padded[name]]
        hidden = self._rules[symbols[-1]].value_in(name) if symbols else 0
        there = 0 if hidden else 1
        values = np.full(shape, there, np.float64 if isinstance(hidden, float) else np.int64)
        if rng is not None:
            values[rng.random(shape) < 0.5] = hidden
            first = tuple(
                0 if axis in dict(self._padded[name]) else slice(None) for axis in range(len(shape))
            )
            values[first] = there
        return values

    def _find_masks(self) -> set[str]:
        """The inputs that are, or may be, masks."""
        specs = self._signature.inputs
        named = {
            spec.name for spec in specs if "mask" in spec.name.lower() and not is_text(spec.dtype)
        }
        carriers = [spec for spec in specs if self._padded[spec.name]]
        if named or len(carriers) < 2:
            return named
        plain = {None, 1, *(spec.shape[0] for spec in specs if spec.shape), *self._rules}
        # Floats without a dim of their own, beside others that have one, or are indices or text.
        telling = {
            spec.name for spec in carriers if _kind(spec) not in "fc" or {*spec.shape} - plain
        }
        return {
            spec.name
            for spec in carriers
            if _kind(spec) in "iub"
            or (telling and spec.name not in telling and not is_text(spec.dtype))
        }


def _kind(spec: TensorSpec) -> str:
    """NumPy's; ``O`` is text."""
    return DTYPES[spec.dtype].kind


def _kind_of(specs: Sequence[TensorSpec], name: str) -> str:
    return next(_kind(spec) for spec in specs if spec.name == name)
