"""Watches that Celery's event loop runs: it answers remote control, and ends the worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: Seconds between its ticks.
TICK_S: Final = 1.0
#: Seconds without a tick after which the loop counts as hanging: reconnecting takes half of that.
STALL_S: Final = 60.0


class MainLoop:
    """`tick` is called from that loop, `problem` once a second, from another thread.

    `excused` returns whether it need not run now: Redis is away, or Celery executes a foreign task.
    `answering_since` returns when Redis last came back, which the loop may not have noticed yet.
    """

    name = "celery"

    def __init__(
        self,
        excused: Callable[[], bool],
        answering_since: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._excused = excused
        self._answering_since = answering_since
        self._clock = clock
        #: When it last ticked or was excused; None: it has not started.
        self._well_at: float | None = None

    def tick(self) -> None:
        self._well_at = self._clock()

    def problem(self) -> str | None:
        """See `Periodic.problem`."""
        if self._well_at is None:
            return None
        now = self._clock()
        if self._excused():
            self._well_at = now
        silent = now - max(self._well_at, self._answering_since())
        return f"has not got on for {silent:.0f} s" if silent > STALL_S else None
