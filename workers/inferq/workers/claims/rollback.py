"""What was settled lately, to be stored again if Redis goes back in time.

With ``appendfsync everysec`` a Redis that crashes comes back as it was a second or two ago, and so
does a replica that takes over. What it acknowledged since is gone: results, and which requests of
a claim were settled. The very bytes that stored results and told who waits are kept: nothing else
costs a worker so little.

What acknowledged is not: it may belong to a claim of which an earlier MULTI, not kept any more,
settled a part. Claims are looked through anew instead (see Incarnation.catch_up).
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import msgspec

from inferq.shared.resp import Packed

#: Seconds that they are kept: more than such a Redis goes back.
KEEP_S: Final = 5.0
#: Requests whose settling is kept at most, and its bytes; beyond that the oldest is dropped: what a
#: Redis has forgotten of these is claimed again and computed once more. What stays in memory costs
#: the cache: without the first limit 12 % of the CPU of a no-op, with 64 MB 20 % of one of 150 KB.
KEEP_REQUESTS: Final = 2_000
KEEP_BYTES: Final = 16 * 1024 * 1024


class Multi(msgspec.Struct, gc=False):
    """One MULTI that settled."""

    #: When Redis has last answered for it (monotonic s).
    at: float
    number: int
    #: What stores its results and dead letters, and tells who waits.
    storing: Packed
    requests: int
    size: int


class SettledMultis:
    """The MULTIs of the last seconds that settled, oldest first. Not thread-safe."""

    def __init__(self) -> None:
        self._multis: deque[Multi] = deque()
        self._requests = 0
        self._bytes = 0
        #: The number of the last MULTI of this incarnation that Redis has answered for; 0: none.
        self.last = 0

    def add(self, storing: Packed, requests: int, number: int) -> None:
        """Redis has answered: the MULTI of this number settled so many requests, by `storing`."""
        multi = Multi(time.monotonic(), number, storing, requests, storing.size)
        self._multis.append(multi)
        self._requests += multi.requests
        self._bytes += multi.size
        self.last = number
        self.trim()

    def trim(self) -> None:
        """Drop what is old enough. Only while Redis answers: its own absence is not counted."""
        since = time.monotonic() - KEEP_S
        while self._multis and (
            self._bytes > KEEP_BYTES or self._requests > KEEP_REQUESTS or self._multis[0].at < since
        ):
            multi = self._multis.popleft()
            self._requests -= multi.requests
            self._bytes -= multi.size

    def after(self, number: int) -> list[Multi]:
        """What is kept of MULTIs later than that of this number."""
        return [multi for multi in self._multis if multi.number > number]

    def again(self, multi: Multi) -> None:
        """Redis has answered for `multi` once more: it is as new as what was settled just now."""
        multi.at = time.monotonic()

    def clear(self) -> None:
        """Keep nothing of what was."""
        self._multis.clear()
        self._requests = self._bytes = 0
