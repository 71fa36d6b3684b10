"""Counts one step's requests in one process, when they are pushed and when they end.

The sending thread and the client's thread for results both call it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from inferq.producer.pending import Pending, PendingRequest, Result
from inferq.shared.errors import RedisUnavailable
from inferq.workers.bench.tally import Ended, Tally

#: The window of all that was due in the warm-up.
WARM_UP: Final = -1


class Shot:
    """One request that was pushed, as its client's `Watcher`. Monotonic seconds."""

    __slots__ = ("_recorder", "due", "pending", "sent_at")

    def __init__(self, recorder: Recorder, pending: Pending, due: float) -> None:
        self._recorder = recorder
        self.pending = pending
        self.due = due
        self.sent_at = due

    def forked(self) -> None:
        """See `pending.Watcher`: a sender's process is never forked."""

    def resolved(self, pending: PendingRequest) -> None:
        """See `Watcher`."""
        self._recorder.ended(self)


class Recorder:
    """`starts_at`: when the warm-up ends. `one_window`: all that is due counts as window 0.

    `freed` is told when a request ended, and whether Redis refused it.
    """

    def __init__(
        self,
        starts_at: float,
        window_s: float,
        *,
        one_window: bool,
        freed: Callable[[float, bool], None],
    ) -> None:
        self._starts_at = starts_at
        self._window_s = window_s
        self._one_window = one_window
        self._freed = freed
        self._lock = threading.Lock()
        self._tallies: dict[int, Tally] = {}
        self._ended: dict[int, Ended] = {}
        self._open: dict[str, Shot] = {}
        #: Set by `abandon_all`: a request without a result now counts as unanswered.
        self._abandoned = False
        self.last_at = starts_at

    @property
    def in_flight(self) -> int:
        """Pushed and not answered."""
        return len(self._open)

    def end_of(self, window: int) -> float:
        """When it is over."""
        return self._starts_at + (window + 1) * self._window_s

    def _window(self, at: float) -> int:
        return max(WARM_UP, math.floor((at - self._starts_at) / self._window_s))

    def _tally(self, due: float) -> Tally:
        window = self._window(due)
        if self._one_window:
            window = min(window, 0)
        tally = self._tallies.get(window)
        if tally is None:
            tally = self._tallies[window] = Tally()
        return tally

    def refused(self, due: float) -> None:
        """Admission refused the request due then."""
        with self._lock:
            self._tally(due).refused += 1

    def not_sent(self, due: float) -> None:
        """A request was due and will not be sent any more."""
        with self._lock:
            self._tally(due).not_sent += 1

    def sending(self, shots: Sequence[Shot]) -> None:
        """These requests are being pushed now."""
        now = time.monotonic()
        with self._lock:
            for shot in shots:
                shot.sent_at = now
                tally = self._tally(shot.due)
                tally.sent += 1
                tally.late.add(max(0.0, now - shot.due))
                self._open[shot.pending.request_id] = shot

    def ended(self, shot: Shot) -> None:
        """A request has an outcome. Only the first call for a shot in flight counts."""
        outcome = shot.pending.outcome
        with self._lock:
            now = time.monotonic()
            if self._open.pop(shot.pending.request_id, None) is None or outcome is None:
                return
            tally = self._tally(shot.due)
            window = self._window(now)
            ended = self._ended.get(window)
            if ended is None:
                ended = self._ended[window] = Ended()
            latency = max(0.0, now - shot.due)
            if isinstance(outcome, Result):
                self.last_at = now
                tally.succeed(outcome.receipt, max(0.0, shot.sent_at - shot.due), latency)
                ended.succeeded += 1
                ended.latency.add(latency)
            elif self._abandoned:
                tally.abandon(latency)
            else:
                self.last_at = now
                tally.fail(outcome, latency)
                ended.failed += 1
        self._freed(now, isinstance(outcome, RedisUnavailable))

    def take(self, window: int) -> Ended:
        """What ended in a window that is over."""
        with self._lock:
            return self._ended.pop(window, None) or Ended()

    def abandon_all(self) -> list[Pending]:
        """The requests in flight. One that does not succeed after all counts as unanswered."""
        with self._lock:
            self._abandoned = True
            return [shot.pending for shot in self._open.values()]

    def tallies(self) -> dict[int, Tally]:
        """The counts of what was due, by window. Call it once nothing is in flight."""
        with self._lock:
            return self._tallies
