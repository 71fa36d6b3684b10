"""What was settled lately, to be settled again if Redis goes back in time.

With ``appendfsync everysec`` a Redis that crashes comes back as it was a second or two ago, and so
does a replica that takes over. What it acknowledged since is gone: results, and which requests of
a claim were settled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from inferq.workers.settle import Settlement

#: Seconds that settlements are kept: more than such a Redis goes back.
KEEP_S: Final = 5.0
#: Results that are kept at most, and their bytes; beyond that the oldest are dropped. Small results
#: that stay in memory cost a worker its cache: without the first limit, 12 % of the CPU of a no-op.
KEEP_RESULTS: Final = 2_000
KEEP_BYTES: Final = 64 * 1024 * 1024


class Kept:
    """The settlements of the last seconds, oldest first. Not thread-safe."""

    def __init__(self) -> None:
        #: When (monotonic s), what, how many bytes these are, and the number of their MULTI.
        self._blocks: deque[tuple[float, Sequence[Settlement], int, int]] = deque()
        self._bytes = 0
        self._results = 0

    def add(self, settlements: Sequence[Settlement], number: int) -> None:
        """Redis has answered that these are settled, by the MULTI of this number."""
        size = sum([len(done.outcome) for done in settlements])
        self._blocks.append((time.monotonic(), settlements, size, number))
        self._bytes += size
        self._results += len(settlements)
        self.trim()

    def trim(self) -> None:
        """Drop what is old enough. Only while Redis answers: its own absence is not counted."""
        since = time.monotonic() - KEEP_S
        while self._blocks and (
            self._bytes > KEEP_BYTES or self._results > KEEP_RESULTS or self._blocks[0][0] < since
        ):
            _, block, size, _ = self._blocks.popleft()
            self._bytes -= size
            self._results -= len(block)

    def after(self, number: int) -> list[Settlement]:
        """What is kept of MULTIs later than that of this number."""
        return [done for _, block, _, at in self._blocks if at > number for done in block]

    def keep_results(self) -> None:
        """Go on as another incarnation: what was kept of messages besides is in Redis' care."""
        self._blocks = deque(
            (at, [done for done in block if not done.before], size, number)
            for at, block, size, number in self._blocks
        )
        self._results = sum(len(block) for _, block, _, _ in self._blocks)

    def clear(self) -> None:
        """Keep nothing of what was."""
        self._blocks.clear()
        self._bytes = self._results = 0
