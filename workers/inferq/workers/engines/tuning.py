"""The batch size that serves most rows a second, from the run times that were measured.

Bigger is not always better: on two CPU cores magika is fastest at batch 1 or 2, full batches of 32
give 0.69 of that. Times are those of all lanes at once, as they run under load. What lies between
two sizes that were measured is on the line through both; what lies beyond them is on the fitted
line: a fixed part, and a part for each row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from inferq.shared.schema import Array, Signature, zeros
from inferq.workers.batching.padding import PadRule

#: Seconds that one batch costs beside its run: the CPU of handing it to a lane and its outcomes
#: back. It speaks for a larger batch where the engine itself hardly does. What it costs to claim
#: and settle is shared by the batches formed ahead.
PER_BATCH_S: Final = 0.1e-3
#: A smaller batch is preferred to the fastest one if it reaches this share of it: it waits less.
GOOD_ENOUGH: Final = 0.985
#: A size beyond all that were measured counts with so much of what the line lets expect: the slope
#: of a few runs is not sure.
BEYOND: Final = 0.8


@dataclass(frozen=True)
class Line:
    """Seconds that a batch takes: a fixed part, and one for each row. Neither is negative."""

    fixed_s: float
    per_row_s: float

    def at(self, rows: float) -> float:
        """Of so many rows."""
        return self.fixed_s + self.per_row_s * rows


def fitted(seconds: Mapping[int, float]) -> Line:
    """The line through `seconds` (rows → seconds, at least one) with the least relative errors.

    Of one point nothing tells the parts apart: then all of it counts as the rows' part, so that
    nobody expects a gain that was not seen.
    """
    if len(seconds) == 1:
        ((rows, taken),) = seconds.items()
        return Line(0.0, taken / rows)
    # Least squares of (fixed + per_row × rows) / taken - 1.
    ones = [1 / taken for taken in seconds.values()]
    slopes = [rows / taken for rows, taken in seconds.items()]
    aa, bb = sum(x * x for x in ones), sum(x * x for x in slopes)
    ab = sum(x * y for x, y in zip(ones, slopes, strict=True))
    determinant = aa * bb - ab * ab
    if determinant > 0:
        fixed = (bb * sum(ones) - ab * sum(slopes)) / determinant
        per_row = (aa * sum(slopes) - ab * sum(ones)) / determinant
        if fixed >= 0 and per_row >= 0:
            return Line(fixed, per_row)
        if fixed >= 0:
            return Line(sum(ones) / aa, 0.0)
    return Line(0.0, sum(slopes) / bb)


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what follows from it."""

    #: Rows of each size that was measured, at least one → seconds of a batch.
    seconds: Mapping[int, float]
    #: The sizes that may be aimed at, ascending.
    sizes: tuple[int, ...]
    #: How many batches run at once.
    lanes: int = 1

    def batch_s(self, rows: int) -> float:
        """Seconds of a batch of `rows`: measured, or else as the measured ones let expect."""
        found = self.seconds.get(rows)
        if found is not None:
            return found
        known = sorted(self.seconds)
        place = bisect_left(known, rows)
        if 0 < place < len(known):
            below, above = known[place - 1], known[place]
            share = (rows - below) / (above - below)
            return (1 - share) * self.seconds[below] + share * self.seconds[above]
        line = fitted(self.seconds)
        nearest = known[min(place, len(known) - 1)]
        return self.seconds[nearest] * line.at(rows) / line.at(nearest)

    def rows_per_s(self, rows: int) -> float:
        """What all lanes serve with batches of so many rows, what a batch costs included."""
        return rows / (self.batch_s(rows) / self.lanes + PER_BATCH_S)

    @property
    def best(self) -> int:
        """The smallest size that serves as many rows as the best."""
        seen = max(self.seconds)
        served = {n: self.rows_per_s(n) * (1 if n <= seen else BEYOND) for n in self.sizes}
        top = max(served.values())
        return min(size for size, rate in served.items() if rate >= GOOD_ENOUGH * top)

    @property
    def seconds_per_row(self) -> float:
        """With batches of the best size."""
        best = self.best
        return self.batch_s(best) / best / self.lanes


def sizes(max_batch_size: int, buckets: Sequence[int]) -> list[int]:
    """The sizes to try: the buckets, or the powers of two, up to and with `max_batch_size`."""
    if buckets:
        return [*(size for size in buckets if size < max_batch_size), max_batch_size]
    powers = [2**n for n in range(max_batch_size.bit_length()) if 2**n < max_batch_size]
    return [*powers, max_batch_size]


def sample(
    signature: Signature,
    rows: int,
    pads: Mapping[str, PadRule],
    optimum: Mapping[str, int] | None = None,
    *,
    batchable: bool = True,
) -> dict[str, Array] | None:
    """Zeros that fit `signature`; None if nothing says how large a dim is.

    `optimum`: symbol → size; it wins over the largest bucket of `pads`.
    """
    batch, known = signature.batch_symbol if batchable else None, optimum or {}
    arrays: dict[str, Array] = {}
    for spec in signature.inputs:
        shape: list[int] = []
        for dim in spec.shape:
            if isinstance(dim, int):
                shape.append(dim)
            elif dim is None:
                return None
            elif dim == batch:
                shape.append(rows)
            elif dim in known:
                shape.append(known[dim])
            elif dim in pads:
                shape.append(pads[dim].buckets[-1])
            else:
                return None
        arrays[spec.name] = zeros(spec.dtype, shape)
    return arrays
