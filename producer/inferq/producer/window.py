"""The bookkeeping of `map`: which requests are in flight, and in what order they came. No I/O."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from inferq.producer.outgoing import PUSH_BLOCK, Inputs
from inferq.producer.pending import PendingRequest, Result
from inferq.shared.errors import InferqError, InvalidInput

#: Finished requests that may wait for a slower one before them, as a multiple of `in_flight`.
_HELD_BACK: Final = 4
#: Seconds after which a block is pushed although it is not full: items may come slowly.
BLOCK_AGE_S: Final = 0.001
#: Bytes at which a block is pushed although it is not full.
BLOCK_BYTES: Final = 1024 * 1024

P = TypeVar("P", bound=PendingRequest)


class Window(Generic[P]):
    """One run of `map`.

    The thread (or task) that runs `map` calls everything but `resolved`, which the one that reads
    results calls.
    """

    def __init__(self, in_flight: int) -> None:
        if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
            raise InvalidInput(f"in_flight {in_flight!r}; expected a whole number of at least 1")
        self._in_flight = in_flight
        #: Requests in one push: few where few are in flight, so that lanes stay busy.
        self.block = min(PUSH_BLOCK, max(1, in_flight // 8))
        #: Submitted and not yet yielded, oldest first; what could not be submitted is its error.
        self.order: deque[P | InferqError] = deque()
        #: Inputs that were taken from the iterator and for which the queue had no room.
        self.held: deque[Inputs] = deque()
        self._entered = 0
        self._counting = threading.Lock()
        self._resolved = 0
        self._wake: Callable[[], None] | None = None
        self._wake_at = 0

    @property
    def unresolved(self) -> int:
        """Requests in flight."""
        return self._entered - self._resolved

    @property
    def room(self) -> int:
        """How many more may be submitted now."""
        return min(
            self._in_flight - self.unresolved, _HELD_BACK * self._in_flight - len(self.order)
        )

    def wants_block(self) -> bool:
        """Whether there is room for a whole block, and the queue is not known to be full."""
        if self.held and self.unresolved:
            return self._resolved >= self._wake_at
        return self.room >= self.block

    def enter(self, pending: P) -> None:
        """Count a request as in flight, before it is pushed."""
        pending.watcher = self
        self._entered += 1
        self.order.append(pending)

    def resolved(self, pending: PendingRequest) -> None:
        """See `pending.Watcher`."""
        with self._counting:
            self._resolved += 1
        wake = self._wake
        if wake is not None and (
            self._resolved >= self._wake_at or (self.order and pending is self.order[0])
        ):
            self._wake = None
            wake()

    def forked(self) -> None:
        """See `pending.Watcher`."""
        self._counting = threading.Lock()  # a thread of the parent's may have held the old one

    def hold(self, items: Iterable[Inputs]) -> None:
        """Keep inputs back until something in flight is resolved."""
        self.held.extend(items)
        self._wake_at = self._resolved + 1

    def unhold(self) -> list[Inputs]:
        """Take all that is held."""
        items = list(self.held)
        self.held.clear()
        return items

    def fail(self, problem: InferqError) -> None:
        """Put an error at the place of an input that could not be submitted."""
        self.order.append(problem)

    def pop(self) -> Result | InferqError:
        """The outcome of the oldest request. `head_ready` must be true."""
        head = self.order.popleft()
        if isinstance(head, InferqError):
            return head
        return head.outcome or head.overdue()

    def overdue(self) -> tuple[P, InferqError]:
        """The oldest request, which is unresolved, and the error that its caller gets."""
        head = self.order[0]
        assert not isinstance(head, InferqError)
        return head, head.overdue()

    def leave(self) -> list[P]:
        """The requests that nobody waits for any more."""
        return [one for one in self.order if not isinstance(one, InferqError)]

    def head_ready(self) -> bool:
        """Whether the oldest request can be yielded."""
        head = self.order[0]
        return isinstance(head, InferqError) or head.done()

    def arm(self, wake: Callable[[], None], *, more: bool) -> bool:
        """Have `wake` called once there is something to do. False if there already is.

        That is: the oldest request is resolved, or (if there is `more` input) a block has room.
        """
        if not self.held:
            missing = self.block - self.room
            self._wake_at = self._resolved + max(1, missing) if more else self._entered + 1
        self._wake = wake
        # `resolved` counts before it looks for `wake`: one of the two sees the other.
        if self.head_ready() or (more and self.wants_block()):
            self._wake = None
            return False
        return True
