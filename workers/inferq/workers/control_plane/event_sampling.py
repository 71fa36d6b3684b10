"""Chooses requests for task events if there are more than anybody could look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from zlib import crc32

from inferq.workers.batching.waiting import Waiting

#: Seconds over which the rate of requests is measured.
WINDOW_S: Final = 1.0
#: All ids, as `_place` counts them.
_ALL: Final = 1 << 16


def _place(request_id: str) -> int:
    """The place of an id among all ids: the same in every worker, so that workers choose alike."""
    return crc32(request_id.encode()) & (_ALL - 1)


class Sampler:
    """Chooses at most `per_s` requests a second (and as many more at once after a pause).

    Above that rate it chooses low enough ids, evenly over time. A request that ended a worker
    before is always chosen. One thread calls `choose`.
    """

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._tokens = float(per_s)
        #: Ids below it are taken.
        self._below = _ALL
        self._at = 0.0
        self._window_began = 0.0
        self._seen = 0
        #: Requests that were not chosen, since the start.
        self.left_out = 0

    def choose(self, items: Sequence[Waiting], now: float) -> Sequence[Waiting]:
        """Those of `items` for which events are sent. `now`: monotonic s."""
        self._tokens = min(self._per_s, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        self._seen += len(items)
        if now - self._window_began >= WINDOW_S:
            self._measure(now)
        chosen = items
        if self._below < _ALL:
            below = self._below
            chosen = [item for item in items if item.alone or _place(item.ticket.id) < below]
        if len(chosen) > self._tokens:
            first = sorted(chosen, key=lambda item: not item.alone)
            chosen = first[: max(int(self._tokens), sum(item.alone for item in chosen))]
        self._tokens = max(0.0, self._tokens - len(chosen))
        self.left_out += len(items) - len(chosen)
        return chosen

    def _measure(self, now: float) -> None:
        wanted = self._per_s * (now - self._window_began)
        self._below = _ALL if self._seen <= wanted else int(_ALL * wanted / self._seen)
        self._window_began, self._seen = now, 0
