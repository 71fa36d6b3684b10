"""Which requests are due now: a closed loop's, and an open loop's."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

#: Seconds after which a user who was refused asks again.
REFUSED_PAUSE_S: Final = 0.02


class Source(Protocol):
    """Monotonic seconds. One thread takes; `freed` may be called by another."""

    #: Whether the end of one request makes another one due.
    closed: bool

    def take(self, now: float, most: int) -> list[float]:
        """Up to `most` times at which a request that can be sent now was due, in order."""
        ...

    def next_due(self) -> float:
        """When the next is, unless something is freed before."""
        ...

    def freed(self, at: float, refused: bool) -> None:
        """A request that was taken has ended, or could not be handed over."""
        ...

    def give_up(self, until: float) -> None:
        """The step is over: count what is due before `until`, and was not taken, as not sent."""
        ...


class ClosedLoop:
    """As many users as may be in flight: each asks anew the moment it is answered."""

    closed = True

    def __init__(self, users: int, begins_at: float) -> None:
        self._due = deque([begins_at] * users)
        self._later: deque[float] = deque()

    def take(self, now: float, most: int) -> list[float]:
        """See `Source`."""
        later = self._later
        while later and later[0] <= now:
            self._due.append(later.popleft())
        due = self._due
        if due and due[0] > now:  # the step has not begun
            return []
        return [due.popleft() for _ in range(min(most, len(due)))]

    def next_due(self) -> float:
        """See `Source`."""
        if self._due:
            return self._due[0]
        return self._later[0] if self._later else math.inf

    def freed(self, at: float, refused: bool) -> None:
        """See `Source`."""
        if refused:
            self._later.append(at + REFUSED_PAUSE_S)
        else:
            self._due.append(at)

    def give_up(self, until: float) -> None:
        """See `Source`: who has no answer has not asked."""


class OpenLoop:
    """A schedule that waits for nobody. What is due while `room` says 0 is told to `not_sent`."""

    closed = False

    def __init__(
        self, times: Iterator[float], room: Callable[[], int], not_sent: Callable[[float], None]
    ) -> None:
        self._times = times
        self._room = room
        self._not_sent = not_sent
        self._next = next(times, math.inf)

    def take(self, now: float, most: int) -> list[float]:
        """See `Source`."""
        taken: list[float] = []
        most = min(most, self._room())
        while self._next <= now and len(taken) < most:
            taken.append(self._pop())
        if not taken:
            while self._next <= now:
                self._not_sent(self._pop())
        return taken

    def _pop(self) -> float:
        due, self._next = self._next, next(self._times, math.inf)
        return due

    def next_due(self) -> float:
        """See `Source`; infinite once the schedule is at its end."""
        return self._next

    def freed(self, at: float, refused: bool) -> None:
        """See `Source`: the schedule does not care."""

    def give_up(self, until: float) -> None:
        """See `Source`."""
        while self._next < until:
            self._not_sent(self._pop())
