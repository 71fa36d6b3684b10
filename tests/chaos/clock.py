"""The clock of a run's schedule."""

from __future__ import annotations

import math
import threading
import time


class Clock:
    """Seconds since the faults began. It stands still while a worker that is due is not up.

    So faults keep their distances, of which the schedule makes sure that somebody can recover.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = math.inf
        self._holders: set[str] = set()
        self._held_at = 0.0

    def start(self) -> None:
        """Begin. Until then nothing is due."""
        self._began = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of the schedule; below 0 before it began."""
        with self._lock:
            now = self._held_at if self._holders else time.monotonic()
            return now - self._began

    def hold(self, who: str) -> None:
        """Stand still until `who` releases. Idempotent."""
        with self._lock:
            if not self._holders:
                self._held_at = time.monotonic()
            self._holders.add(who)

    def release(self, who: str) -> None:
        """Go on, unless somebody else holds. Idempotent."""
        with self._lock:
            if who in self._holders:
                self._holders.remove(who)
                if not self._holders:
                    self._began += time.monotonic() - self._held_at

    def wait(self, at_s: float, over: threading.Event) -> bool:
        """Wait until a fault is due; False if everything is over before."""
        while (wait_s := at_s - self.elapsed()) > 0:
            if over.wait(min(wait_s, 0.1)):
                return False
        return True
