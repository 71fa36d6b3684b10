"""How much time audits may take, and when the next one may run."""

from __future__ import annotations

import math
from typing import Final

#: Audits may take this share of the time that lanes compute.
SHARE: Final = 0.005
#: The first audits may exceed it, so that a wrong model is found at once.
FREE: Final = 3
#: An audit that is this many times overdue runs although requests wait: a busy lane never idles.
LATE: Final = 4
#: But only if a batch takes less time than this, in s: else requests would wait too long.
SHORT_S: Final = 0.1


class AuditBudget:
    """When the next audit may run. Any lane's thread calls it; a lost count does no harm.

    The first batch is audited, then the second, fourth, eighth one after, …, until only each
    `every`-th is (0: none).
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._gap = 1
        #: Batches until the next audit, counted down by lanes; 0 or less: ask `allows`.
        self.left: float = 1 if every else math.inf
        self._audits = 0
        self._spent_s = 0.0
        self._last_s = 0.0

    def allows(self, took_s: float, computed_s: float, idle: bool) -> bool:
        """Whether a batch that took `took_s` may be audited; lanes have computed `computed_s`.

        `idle`: nothing waits for its lane.
        """
        if not idle and self._gap - self.left < LATE * self._gap:
            return False
        if self._audits < FREE:
            return idle or took_s < SHORT_S
        return self._spent_s + self._last_s <= SHARE * computed_s

    def spent(self, took_s: float) -> None:
        """An audit has ended that took `took_s`."""
        self._gap = min(2 * self._gap, self._every)
        self.left = self._gap
        self._audits += 1
        if self._audits > FREE:
            self._spent_s += took_s
        self._last_s = took_s

    def end(self) -> None:
        """Allow no more audits."""
        self.left = math.inf
