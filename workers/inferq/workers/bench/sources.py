"""Which requests are due now, in a closed loop and in an open loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

#: Seconds after which a refused user of a closed loop sends again.
REFUSED_PAUSE_S: Final = 0.02


class Source(Protocol):
    """Monotonic seconds. One thread takes; `freed` may be called by another."""

    #: Whether the end of one request makes another one due.
    closed: bool

    def take(self, now: float, most: int) -> list[float]:
        """The due times of up to `most` requests that can be sent now, in order."""
        ...

    def next_due(self) -> float:
        """When the next request is due, unless one is freed before."""
        ...

    def freed(self, at: float, refused: bool) -> None:
        """A request that was taken has ended, or could not be pushed."""
        ...

    def give_up(self, until: float) -> None:
        """The step is over: count requests due before `until` that were not taken as not sent."""
        ...


class ClosedLoop:
    """As many users as requests may be in flight: each sends its next one once it is answered."""

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
        """See `Source`: a user who waits for an answer has nothing due."""


class OpenLoop:
    """A schedule that does not wait for answers.

    `not_sent` gets what is due while `room` returns 0.
    """

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
        """See `Source`; infinite once the schedule has ended."""
        return self._next

    def freed(self, at: float, refused: bool) -> None:
        """See `Source`: the schedule does not depend on it."""

    def give_up(self, until: float) -> None:
        """See `Source`."""
        while self._next < until:
            self._not_sent(self._pop())
