"""A histogram of durations. It merges exactly, and its percentiles are right to half a percent."""

from __future__ import annotations

import math
from typing import Final

import msgspec

#: Each bucket is 1 % wider than the one before; its middle is at most 0.5 % off.
RATIO: Final = 1.01
#: Seconds; a shorter duration counts as this one.
SHORTEST: Final = 1e-6
_LOG: Final = math.log(RATIO)


class Histogram(msgspec.Struct):
    """Counts of durations in seconds, by bucket: number b holds SHORTEST × RATIO^b and more."""

    counts: dict[int, int] = msgspec.field(default_factory=dict)
    total: int = 0
    sum: float = 0.0
    least: float = math.inf
    most: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        bucket = int(math.log(seconds / SHORTEST) / _LOG) if seconds > SHORTEST else 0
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.total += 1
        self.sum += seconds
        self.least = min(self.least, seconds)
        self.most = max(self.most, seconds)

    def merge(self, other: Histogram) -> None:
        """Add all counts of `other`, as if its durations had been added here."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.total += other.total
        self.sum += other.sum
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)

    def percentile(self, percent: float) -> float:
        """Seconds that `percent` of 100 durations do not exceed (nearest rank); 0 if there is none.

        The shortest and the longest are exact.
        """
        rank = max(1, math.ceil(self.total * percent / 100))
        if rank >= self.total:
            return self.most
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                middle = SHORTEST * math.exp((bucket + 0.5) * _LOG)
                return min(max(middle, self.least), self.most)
        return self.most

    @property
    def mean(self) -> float:
        """Seconds; 0 if there is none."""
        return self.sum / self.total if self.total else 0.0
