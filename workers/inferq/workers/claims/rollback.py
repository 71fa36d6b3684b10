"""Keeps what was settled lately, to store it again if Redis goes back in time.

With ``appendfsync everysec`` a Redis that crashes comes back as it was a second or two ago, and so
does a replica that takes over. What Redis acknowledged since is gone: results, and which requests
of a claim were settled. Kept are the very bytes that stored results and told who waits, since
nothing else takes a worker so little time.

The commands that acknowledged requests are not kept: an earlier MULTI, no longer kept, may have
settled another part of the same claim. Instead claims are read anew (see Incarnation.catch_up).
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import msgspec

from inferq.shared.resp import Packed

#: Seconds that they are kept: longer than such a Redis goes back.
KEEP_S: Final = 5.0
#: Most requests, and most bytes, that are kept; beyond that the oldest are dropped. If Redis has
#: forgotten those, they are claimed again and computed once more. Memory in use costs cache:
#: without the first limit, 12 % of the CPU of a no-op; with 64 MB, 20 % of one of 150 KB.
KEEP_REQUESTS: Final = 2_000
KEEP_BYTES: Final = 16 * 1024 * 1024


class Multi(msgspec.Struct, gc=False):
    """One MULTI that settled."""

    #: When Redis last confirmed it (monotonic s).
    at: float
    number: int
    #: The commands that store its results and dead letters, and tell who waits.
    storing: Packed
    requests: int
    size: int


class SettledMultis:
    """The MULTIs of the last seconds that settled, oldest first. Not thread-safe."""

    def __init__(self) -> None:
        self._multis: deque[Multi] = deque()
        self._requests = 0
        self._bytes = 0
        #: The number of the last MULTI of this incarnation that Redis has confirmed; 0: none.
        self.last = 0

    def add(self, storing: Packed, requests: int, number: int) -> None:
        """Redis has confirmed the MULTI of this number, which settled `requests` by `storing`."""
        multi = Multi(time.monotonic(), number, storing, requests, storing.size)
        self._multis.append(multi)
        self._requests += multi.requests
        self._bytes += multi.size
        self.last = number
        self.trim()

    def trim(self) -> None:
        """Drop what is old enough. Called only while Redis answers: its outages do not count."""
        since = time.monotonic() - KEEP_S
        while self._multis and (
            self._bytes > KEEP_BYTES or self._requests > KEEP_REQUESTS or self._multis[0].at < since
        ):
            multi = self._multis.popleft()
            self._requests -= multi.requests
            self._bytes -= multi.size

    def after(self, number: int) -> list[Multi]:
        """The kept MULTIs with higher numbers."""
        return [multi for multi in self._multis if multi.number > number]

    def again(self, multi: Multi) -> None:
        """Redis has confirmed `multi` once more: it counts as new again."""
        multi.at = time.monotonic()

    def clear(self) -> None:
        """Drop everything."""
        self._multis.clear()
        self._requests = self._bytes = 0
