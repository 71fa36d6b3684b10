"""The lanes' real batches go on refining which size is best.

What all sizes have in common, a machine that is busy otherwise or inputs that are no zeros, says
nothing about which is best: each size is judged by how it differs from the others meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Final

from inferq.workers.engines.tuning import Tuning

#: How much the newest batch weighs in the mean of its size, and in that of all sizes.
WEIGHT: Final = 0.01
COMMON_WEIGHT: Final = 0.01
#: Batches of one size before it is believed.
ENOUGH: Final = 100
#: Batches between two looks at which size is best.
LOOK: Final = 64
#: Another size has to serve so many times the rows that the present one does, so many looks in a
#: row.
BETTER: Final = 1.05
LOOKS: Final = 3


class Learner:
    """Of one model. Owned by the data plane's thread."""

    def __init__(self, tuning: Tuning, target: int) -> None:
        self._tuning = tuning
        self._sizes = list(tuning.sizes)
        #: The size that is aimed at.
        self.target = target
        #: How many times the expected seconds a batch takes: of each size, and of all.
        self._ratios = [1.0] * len(self._sizes)
        self._counts = [0] * len(self._sizes)
        self._common = 1.0
        self._until_look = LOOK
        #: What the last looks found better, and how many of them.
        self._better: tuple[int, int] = target, 0

    def ran(self, rows: int, seconds: float) -> bool:
        """A batch ran at `rows` while all lanes were busy. Whether `target` has changed."""
        place = min(bisect_left(self._sizes, rows), len(self._sizes) - 1)
        ratio = seconds / self._tuning.batch_s(rows)
        count = self._counts[place] = self._counts[place] + 1
        # The mean of the first ones, so that the very first does not count for more.
        self._ratios[place] += max(WEIGHT, 1 / count) * (ratio - self._ratios[place])
        if self._sizes[place] in self._tuning.seconds:
            # Of a size that was not measured, its own time is what was to be found out.
            self._common += COMMON_WEIGHT * (ratio - self._common)
        self._until_look -= 1
        if self._until_look:
            return False
        self._until_look = LOOK
        return self._look()

    @property
    def has_learnt(self) -> bool:
        """Whether any size is known better than before."""
        return max(self._counts) >= ENOUGH

    def learnt(self) -> Tuning:
        """What was measured, corrected by what ran since."""
        return replace(
            self._tuning,
            seconds={
                size: self._tuning.batch_s(size) * (ratio / self._common if count >= ENOUGH else 1)
                for size, ratio, count in zip(self._sizes, self._ratios, self._counts, strict=True)
                if count >= ENOUGH or size in self._tuning.seconds
            },
        )

    def _look(self) -> bool:
        best = self.target
        if self._counts[self._sizes.index(self.target)] >= ENOUGH:
            learnt = self.learnt()
            if learnt.rows_per_s(learnt.best) >= BETTER * learnt.rows_per_s(self.target):
                best = learnt.best
        before, looks = self._better
        self._better = best, looks + 1 if best == before else 1
        if best == self.target or self._better[1] < LOOKS:
            return False
        self.target = best
        return True
