"""Redis' clock as seen from here: what timestamps and deadlines are compared with.

A time of this process' monotonic clock is called ``…_mono_ms``. One of Redis' clock is called
``…_redis_ms`` where both meet; what travels (``sent_ms``, ``deadline_ms``) is always Redis'.
"""

from __future__ import annotations

import time


class RedisClock:
    """Redis time in ms, carried on by the monotonic clock, so no wrong wall clock matters.

    The offset is a plain float that one thread writes and others read.
    """

    def __init__(self) -> None:
        self._offset = time.time() * 1000 - self._monotonic()

    @staticmethod
    def _monotonic() -> float:
        return time.monotonic() * 1000

    def set(self, redis_ms: float, asked_at: float) -> None:
        """Take over `redis_ms`, asked for at `asked_at` (``time.monotonic()``, s)."""
        middle = (asked_at + time.monotonic()) / 2 * 1000
        self._offset = redis_ms - middle

    def now(self) -> float:
        """Redis ms, now."""
        return self._monotonic() + self._offset
