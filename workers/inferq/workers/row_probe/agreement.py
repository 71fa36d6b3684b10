"""Compares two runs of a model: whether they gave the same answer, or how much they differ.

A row is computed again among other rows, or with other padding; its answer must not change.
Integers, flags and shapes are compared by value. Floats may differ by rounding, since an engine may
add in another order when it runs another number of rows: `ROUNDING` says by how much, for each
dtype.

The rounding of values close to 0 depends on the values they were computed from, so it is measured
by the larger values beside them. But an output may also hold values of another kind, such as a
mask's in place of scores (-1e9) or time stamps. These are many orders of magnitude larger, and do
not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from inferq.shared.schema import Array, Tensors


@dataclass(frozen=True)
class Tolerance:
    """Largest difference that counts as rounding: ``of_value · |a| + of_largest · max |a|``."""

    of_value: float
    of_largest: float


#: By NumPy name. A network of 50 layers of float32 differs by 1e-6 of its largest value.
ROUNDING: Final[Mapping[str, Tolerance]] = {
    "float16": Tolerance(1e-2, 2e-3),
    "float32": Tolerance(1e-4, 2e-5),
    "float64": Tolerance(1e-4, 2e-5),  # often computed in float32 and cast
    "complex64": Tolerance(1e-4, 2e-5),
    "complex128": Tolerance(1e-4, 2e-5),
}


#: If a value is so many times the next smaller one, the two are of different kinds. If there are
#: fewer than `FEW` smaller ones, which may all be close to 0 by chance, the second number applies.
GAP: Final = 1e3
FEW, FEW_GAP = 3, 1e5
#: But there are two kinds only if the smaller values are at least this share of all values, or if
#: the larger values differ by at most this factor.
PART: Final = 0.05
NEARLY_EQUAL: Final = 2.0


@dataclass(frozen=True)
class Difference:
    """How one output of one run differs from that of another."""

    output: str
    #: Largest difference, as a share of the output's largest value; inf: in shape or in NaNs.
    share: float
    #: Cosine of the angle between both, for floats of one shape.
    cosine: float | None
    #: In words: ``shape [3] in place of [4]``, ``by 0.19 of values up to 10``.
    what: str

    def __str__(self) -> str:
        cosine = "" if self.cosine is None else f" (cosine {self.cosine:.4g})"
        return f"output {self.output!r} differs {self.what}{cosine}"


def difference(
    expected: Tensors, got: Tensors, scale: float = 1.0, typical_max: float = 0.0
) -> Difference | None:
    """The largest difference of any output, beyond rounding; None if there is none.

    `scale` multiplies what counts as rounding: runs of equal shapes round alike (0.01, for
    example). `typical_max`: the typical largest value. Smaller values may still differ by the
    rounding of it.
    """
    found = [_compare(name, expected[name], got[name], scale, typical_max) for name in expected]
    differing = [each for each in found if each is not None]
    return max(differing, key=lambda each: each.share, default=None)


def _compare(
    name: str, expected: Array, got: Array, scale: float, typical_max: float
) -> Difference | None:
    if expected.shape != got.shape:
        what = f"in shape: {list(got.shape)} in place of {list(expected.shape)}"
        return Difference(name, math.inf, None, what)
    if expected.dtype.kind not in "fc":
        return _compare_exactly(name, expected, got)
    rounding = ROUNDING[expected.dtype.newbyteorder("=").name]
    a, b = _widened(expected), _widened(got)
    finite = np.isfinite(a)
    if (
        not np.array_equal(a[~finite], b[~finite], equal_nan=True)
        or not np.isfinite(b[finite]).all()
    ):
        return Difference(name, math.inf, None, "in NaN or infinite values")
    a, b = a[finite], b[finite]
    if not a.size:
        return None
    apart = np.abs(a - b)
    if not apart.any():
        return None
    sizes = np.abs(a)
    beside = _beside(sizes, typical_max)
    wrong = apart > scale * (rounding.of_value * sizes + rounding.of_largest * beside)
    if not wrong.any():
        return None
    with np.errstate(over="ignore"):
        shares = apart / np.maximum(beside, np.finfo(float).tiny)
    worst = int(np.argmax(np.where(wrong, shares, 0.0)))
    most, largest = float(apart[worst]), float(beside[worst])
    share = most / largest if largest else math.inf
    what = (
        f"by {most:.3g} of values up to {largest:.3g}" if largest else f"by {most:.3g} from zeros"
    )
    return Difference(name, share, _cosine(a, b), what)


def typical(array: Array) -> float:
    """The largest of an output's values, without those of another kind far above."""
    if array.dtype.kind not in "fc":
        return 0.0
    sizes = np.abs(_widened(array))
    sizes = sizes[np.isfinite(sizes)]
    return float(_tops(sizes)[0]) if sizes.size else 0.0


def _beside(sizes: Array, typical_max: float) -> Array:
    """For each of `sizes` the largest of its kind; of the smallest kind at least `typical_max`."""
    tops = _tops(sizes)
    kinds = np.searchsorted(tops[:-1], sizes)
    tops[0] = max(tops[0], typical_max)
    return tops[kinds]


def _tops(sizes: Array) -> Array:
    """The largest of each kind of `sizes`, ascending."""
    there = np.sort(sizes[sizes > 0])
    if there.size < 2:
        return there if there.size else np.zeros(1)
    ratios = there[1:] / there[:-1]
    ends = [
        int(end)
        for end in np.flatnonzero(ratios >= GAP)
        if ratios[end] >= (GAP if end + 1 >= FEW else FEW_GAP)
        and (end + 1 >= PART * there.size or there[-1] <= NEARLY_EQUAL * there[end + 1])
    ]
    return there[[*ends, there.size - 1]]


def _compare_exactly(name: str, expected: Array, got: Array) -> Difference | None:
    wrong = int(np.count_nonzero(expected != got))
    if not wrong:
        return None
    what = f"in {wrong} of {expected.size} values"
    return Difference(name, wrong / expected.size, None, what)


def _widened(array: Array) -> Array:
    wide: type[Any] = np.complex128 if array.dtype.kind == "c" else np.float64
    return array.astype(wide)


def _cosine(a: Array, b: Array) -> float | None:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.real(np.vdot(a, b))) / lengths if lengths else None
