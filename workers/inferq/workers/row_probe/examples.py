"""Makes example inputs of several kinds to try a model: five rows each, three if rows are large.

Rows may depend on each other only where values are large, negative or zero, or of very different
magnitude, so all of these are tried. Which integers are valid (indices of a table, say) is not
known: small ones are, most likely, and larger ones are tried for one input at a time. Text is
digits at first, which a model that reads numbers takes as well, then words and sentences of very
different length: a tokenizer may pad all rows to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from inferq.shared.schema import DTYPES, Array, TensorSpec, is_text
from inferq.shared.text import BYTES, of_elements

Shape = tuple[int, ...]

#: Rows of an example, and of one that would otherwise be too large.
ROWS: Final = 5
FEWER_ROWS: Final = 3
#: No example holds more input elements than this: 256 MB of float32.
MAX_ELEMENTS: Final = 1 << 26
#: Integers are below the first of these limits that the model accepts.
INTEGER_LIMITS: Final = (1000, 256, 64, 16, 8, 4)
LOWEST_INTEGER: Final = -100
#: Most integer inputs that are tried with larger integers.
MAX_INTEGER_INPUTS: Final = 4
#: Rows of few elements hold few different values: each kind is then tried several times.
FEW_ELEMENTS: Final = 64
ROUNDS: Final = 4

#: Words of an example's longest text; and what it is made of.
SENTENCE: Final = 12
_WORDS: Final = (
    "the", "photo", "is", "not", "Good", "bad", "unhappiness", "42", "-1.5", "é", "猫", "?",
)  # fmt: skip

#: Fills floats of this shape.
_Floats = Callable[[np.random.Generator, Shape], Array]


@dataclass(frozen=True)
class Kind:
    """How the inputs are filled."""

    name: str
    floats: _Floats
    #: Input → its smallest value and the first that is too large. Other inputs are 0 and 1.
    integers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    #: Whether each row of integers and flags is all 0 or all 1.
    constant: bool = False
    #: Most words of a string, some of which are none at all; 0: a digit.
    words: int = 0
    seed: int = 0


def _unit(rng: np.random.Generator, shape: Shape) -> Array:
    return rng.random(shape, np.float32)


def _normal(rng: np.random.Generator, shape: Shape) -> Array:
    return rng.standard_normal(shape, np.float32)


def _large(rng: np.random.Generator, shape: Shape) -> Array:
    return 300 * rng.random(shape, np.float32)


def _negative(rng: np.random.Generator, shape: Shape) -> Array:
    return -300 * rng.random(shape, np.float32)


def _mixed(rng: np.random.Generator, shape: Shape) -> Array:
    rows = rng.standard_normal(shape, np.float32)
    rows[2:4] = np.abs(rows[2:4])
    for row in range(len(rows)):
        rows[row] *= (1, 0, 1e4, -1e4, 1e-3)[row]
    return rows


def _constant(_rng: np.random.Generator, shape: Shape) -> Array:
    rows = np.zeros(shape, np.float32)
    rows[(len(rows) + 1) // 2 :] = 1
    return rows


UNIT: Final = Kind("unit", _unit)


def further_kinds(inputs: Sequence[TensorSpec]) -> Iterator[Sequence[Kind]]:
    """Further kinds, the most telling first. Of each sequence, the first accepted one is used."""
    kinds = {spec.name: DTYPES[spec.dtype].kind for spec in inputs}
    floats = "f" in kinds.values() or "c" in kinds.values()
    integers = [name for name, kind in kinds.items() if kind in "iu"][:MAX_INTEGER_INPUTS]
    sizes = [math.prod(dim for dim in spec.shape[1:] if isinstance(dim, int)) for spec in inputs]
    for seed in range(ROUNDS if sum(sizes) <= FEW_ELEMENTS else 1):
        if floats:
            yield [Kind("mixed", _mixed, seed=seed)]
        for name in integers:
            yield [
                Kind(f"{name} < {most}", _unit, {name: (0, most)}, seed=seed)
                for most in INTEGER_LIMITS
            ]
        if "O" in kinds.values():
            yield [
                Kind(f"text of up to {most} words", _unit, words=most, seed=seed)
                for most in (SENTENCE, 1)
            ]
        yield [Kind("constant", _constant, constant=True)]
        if floats:
            yield [Kind("large", _large, seed=seed)]
            yield [Kind("negative", _negative, seed=seed)]
            yield [Kind("normal", _normal, seed=seed)]
        for name in integers:
            if kinds[name] == "i":
                yield [Kind(f"{name} ≤ 0", _unit, {name: (LOWEST_INTEGER, 1)}, seed=seed)]


def shapes_of(
    inputs: Sequence[TensorSpec], size: int, known: Mapping[str, int]
) -> dict[str, Shape] | None:
    """Input → shape of an example. Open dims have the size in `known`, or `size`.

    None: too large.
    """
    inner = {spec.name: tuple(_size(dim, size, known) for dim in spec.shape[1:]) for spec in inputs}
    elements = sum(math.prod(shape) for shape in inner.values())
    for rows in (ROWS, FEWER_ROWS):
        if rows * elements <= MAX_ELEMENTS:
            return {name: (rows, *shape) for name, shape in inner.items()}
    return None


def _size(dim: int | str | None, size: int, known: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    return known.get(dim, size) if dim is not None else size


def rows_of(
    kind: Kind, inputs: Sequence[TensorSpec], shapes: Mapping[str, Shape]
) -> dict[str, Array]:
    """The rows of an example of `kind`, always the same."""
    rng = np.random.default_rng(kind.seed)
    return {spec.name: _filled(kind, spec, shapes[spec.name], rng) for spec in inputs}


def _filled(kind: Kind, spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> Array:
    dtype = DTYPES[spec.dtype]
    if is_text(spec.dtype):
        return texts(spec.dtype, shape, None if kind.constant else rng, kind.words)
    if dtype.kind == "c":
        return (kind.floats(rng, shape) + 1j * kind.floats(rng, shape)).astype(dtype)
    if dtype.kind == "f":
        return kind.floats(rng, shape).astype(dtype)
    if kind.constant:
        return _constant(rng, shape).astype(dtype)
    least, most = kind.integers.get(spec.name, (0, 2))
    if most > 2:
        # As many small ones as large ones.
        small, any_size = np.floor(most ** rng.random(shape)), rng.integers(0, most, shape)
        return _within(np.where(rng.random(shape) < 0.5, small, any_size), dtype)
    return _within(rng.integers(least, most, shape), dtype)


def texts(
    dtype: str, shape: Sequence[int], rng: np.random.Generator | None, words: int = SENTENCE
) -> Array:
    """Strings, or bytes, of up to so many `words`; 0: a digit each. Without `rng` all the same."""
    count = math.prod(shape)
    if rng is None:
        flat = [_WORDS[0]] * count if words else ["1"] * count
    elif words:
        lengths = rng.integers(0, words + 1, count)
        flat = [" ".join(rng.choice(_WORDS, length)) for length in lengths]
    else:
        flat = [str(digit) for digit in rng.integers(0, 10, count)]
    return of_elements([each.encode() for each in flat] if dtype == BYTES else flat, shape)


def _within(values: Array, dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "b":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(values, limits.min, limits.max).astype(dtype)
