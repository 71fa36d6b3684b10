"""Redis' clock as this process knows it: timestamps and deadlines are compared with it.

A time of this process' monotonic clock is called ``…_mono_ms``, one of Redis' clock ``…_redis_ms``
where both occur. Times in messages (``sent_ms``, ``deadline_ms``) are always Redis'.
"""

from __future__ import annotations

import time


class RedisClock:
    """Redis' time in ms, advanced by the monotonic clock, so a wrong wall clock does not matter.

    The offset is a plain float that one thread writes and others read.
    """

    def __init__(self) -> None:
        self._offset = time.time() * 1000 - self._monotonic()

    @staticmethod
    def _monotonic() -> float:
        return time.monotonic() * 1000

    def set(self, redis_ms: float, asked_at: float) -> None:
        """Set the clock by `redis_ms`, as asked for at `asked_at` (``time.monotonic()``, s)."""
        middle = (asked_at + time.monotonic()) / 2 * 1000
        self._offset = redis_ms - middle

    def now(self) -> float:
        """Redis ms, now."""
        return self._monotonic() + self._offset
