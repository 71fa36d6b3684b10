"""Finds how the size of an output's dim depends on an input's dim, from measured sizes.

Networks compute sizes like floors of fractions: a convolution of stride 2 gives ``(n - k) // 2 +
1``, its transpose ``2 * n``, a pyramid ``8 * (n // 8)``. All of these, and any sequence of them,
are periodic: after `period` further sizes the output has grown by the same `gain`. So one period of
measured sizes and its gain determine all sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

#: Consecutive sizes that are measured at first; where time is short; where the period is longer.
FEW: Final = 8
FEWEST: Final = 4
MANY: Final = 80
#: For longer periods, up to this one, two steps are looked for (audio: 320 samples a frame).
MAX_PERIOD: Final = 1 << 16
#: Sizes at which the result is checked however long that takes: the largest and the smallest.
NEEDED: Final = 2
#: Random sizes at which the result is checked.
CHECKS: Final = 4

#: Returns the output's size for this size of the input; None: it cannot be measured.
Measure = Callable[[int], int | None]


@dataclass(frozen=True)
class Grid:
    """The sizes that a model takes: `first`, ``first + step``, …"""

    first: int = 1
    step: int = 1

    def __contains__(self, size: int) -> bool:
        return size >= self.first and (size - self.first) % self.step == 0

    def __str__(self) -> str:
        if self.step == 1:
            return f"at least {self.first}"
        return f"{self.first}, {self.first + self.step}, {self.first + 2 * self.step}, …"


@dataclass(frozen=True)
class Growth:
    """An output's size by an input's size on `grid`; `sizes` are those of one period."""

    grid: Grid
    gain: int
    sizes: tuple[int, ...]
    #: For so many of the smallest sizes it is `least` instead: some models fill up short inputs.
    early: int = 0
    least: int = 0

    def at(self, size: int) -> int:
        """The output's size where the input's is `size`."""
        index = (size - self.grid.first) // self.grid.step
        if self.early and index < self.early:
            return self.least
        periods, rest = divmod(index, len(self.sizes))
        return self.gain * periods + self.sizes[rest]

    @property
    def constant(self) -> bool:
        return not self.gain and len(set(self.sizes)) == 1 and not self.early


def find_growth(
    measure: Measure, grid: Grid, sizes: Sequence[int], *, patient: Callable[[], bool]
) -> Growth | None:
    """The growth that explains `measure` on `grid` up to the last of `sizes`; checked at each.

    None: there is none. `patient` returns False once only the minimum of checks may be made.
    """
    count = (sizes[-1] - grid.first) // grid.step + 1

    def at(index: int) -> int | None:
        return measure(grid.first + index * grid.step)

    def holds(growth: Growth | None) -> bool:
        if growth is None:
            return False
        rng = random.Random(0)
        drawn = [grid.first + grid.step * rng.randrange(count) for _ in range(CHECKS)]
        chosen = (sizes[-1], grid.first, *sizes, *_last_steps(growth, sizes), *drawn)
        for number, size in enumerate(chosen):
            if number >= NEEDED and not patient():
                break
            if measure(size) != growth.at(size):
                return False
        return True

    found = _repeating(at, grid, min(FEW if patient() else FEWEST, count), count)
    if holds(found):
        return found
    found = _stepping(at, grid, count)
    if holds(found):
        return found
    found = _repeating(at, grid, min(MANY, count), count) if patient() else None
    return found if holds(found) else None


def _repeating(
    at: Callable[[int], int | None], grid: Grid, window: int, count: int
) -> Growth | None:
    """The shortest period by which the first `window` sizes repeat."""
    values: list[int] = []
    for index in range(window):
        value = at(index)
        if value is None:
            return None
        values.append(value)
    for period in range(1, (window - 1) // 2 + 1):
        gains = {values[i + period] - values[i] for i in range(window - period)}
        if len(gains) == 1:
            return Growth(grid, gains.pop(), tuple(values[:period]))
    # These are all the sizes: there are no others to predict.
    return Growth(grid, 0, tuple(values)) if window == count else None


def _stepping(at: Callable[[int], int | None], grid: Grid, count: int) -> Growth | None:
    """Growth by equal steps at equal distances, found by halving, for long periods."""
    first = _next_step(at, 0, count)
    second = None if first is None else _next_step(at, first, count)
    if first is None or second is None or second - first > MAX_PERIOD:
        return None
    period = second - first
    low, high = at(first), at(second)
    if low is None or high is None:
        return None
    gain = high - low
    sizes = tuple(low + gain * ((index - first) // period) for index in range(period))
    found, least = Growth(grid, gain, sizes), at(0)
    if least is None or found.at(grid.first) == least:
        return found
    return replace(found, early=first, least=least)


def _next_step(at: Callable[[int], int | None], start: int, count: int) -> int | None:
    """The first index after `start` with another value, provided that values never decrease."""
    here, width = at(start), 1
    if here is None:
        return None
    below = start
    while at(min(start + width, count - 1)) == here:
        below = start + width
        if below >= count - 1:
            return None
        width *= 2
    above = min(start + width, count - 1)
    while above - below > 1:
        middle = (above + below) // 2
        if at(middle) == here:
            below = middle
        else:
            above = middle
    return above


def _last_steps(growth: Growth, sizes: Sequence[int]) -> list[int]:
    """Before each of `sizes`, the last size at which the output grows, and the one before that."""
    found: list[int] = []
    step, first = growth.grid.step, growth.grid.first
    for size in sizes:
        top = growth.at(size)
        for n in range(size, max(first, size - step * len(growth.sizes)), -step):
            if growth.at(n - step) != top:
                found += [n, n - step]
                break
    return [size for size in found if size >= first]
