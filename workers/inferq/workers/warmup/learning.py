"""Refines which size is best by the lanes' real batches.

What slows all sizes alike, such as a busy machine or inputs other than zeros, does not show which
is best. So each size is judged by how it differs from the others at the same time.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Final

from inferq.workers.engines.tuning import Tuning

#: Weight of the newest batch in the mean of its size, and in that of all sizes.
WEIGHT: Final = 0.01
COMMON_WEIGHT: Final = 0.01
#: Batches of one size before its mean is used.
ENOUGH: Final = 100
#: Batches between two decisions about which size is best.
LOOK: Final = 64
#: Another size replaces the present one if it serves so many times its rows, in so many decisions
#: in a row.
BETTER: Final = 1.05
LOOKS: Final = 3


class Learner:
    """Learns one model's best size. Owned by the data plane's thread."""

    def __init__(self, tuning: Tuning, target: int) -> None:
        self._tuning = tuning
        self._sizes = list(tuning.sizes)
        #: The size to aim at.
        self.target = target
        #: Seconds of a batch divided by the expected ones: of each size, and of all.
        self._ratios = [1.0] * len(self._sizes)
        self._counts = [0] * len(self._sizes)
        self._common = 1.0
        self._until_look = LOOK
        #: The size that the last decisions found better, and how many of them.
        self._better: tuple[int, int] = target, 0

    def ran(self, rows: int, seconds: float) -> bool:
        """Note a batch that ran at `rows` while all lanes were busy.

        Returns whether `target` changed.
        """
        place = min(bisect_left(self._sizes, rows), len(self._sizes) - 1)
        ratio = seconds / self._tuning.batch_s(rows)
        count = self._counts[place] = self._counts[place] + 1
        # The plain mean of the first ones, so that the very first does not count for more.
        self._ratios[place] += max(WEIGHT, 1 / count) * (ratio - self._ratios[place])
        if self._sizes[place] in self._tuning.seconds:
            # Only measured sizes count here: others have no expected time of their own.
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
        """The measurements, corrected by the batches since."""
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
