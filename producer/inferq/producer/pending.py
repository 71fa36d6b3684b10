"""Hop 7. One request that was submitted, and what became of it.

The same object serves threads and asyncio; `Pending` and `AsyncPending` only add the wait.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final, Protocol

import msgspec
import numpy as np

from inferq.producer.outgoing import Outgoing
from inferq.shared.errors import Cancelled, InferqError, ResultTimeout
from inferq.shared.schema import Array, Receipt

#: Seconds that `result` and `infer` wait if the caller gives no timeout.
DEFAULT_WAIT_S: Final = 60.0


class State(StrEnum):
    """Where a request stands, as far as this client knows (at most 5 s ago)."""

    #: Accepted; a worker that serves the model is alive.
    QUEUED = "queued"
    #: Accepted and kept, but no worker that serves the model is alive now.
    QUEUED_NO_WORKER = "queued_no_worker"
    #: `result` returns.
    DONE = "done"
    #: `result` raises the request's error.
    FAILED = "failed"
    #: `result` raises Cancelled.
    CANCELLED = "cancelled"


class Result(msgspec.Struct, frozen=True, eq=False):
    """The outputs of a request, and how it was served.

    `outputs`: output name → array with as many rows as the inputs had; the arrays are read-only,
    for they share the reply's bytes (``.copy()`` one to write to it). `receipt` says where the
    time went; None if something other than an inferq worker stored the result.
    """

    outputs: Mapping[str, Array]
    receipt: Receipt | None
    request_id: str
    #: Milliseconds from the call of submit to the decoded result, at this client.
    latency_ms: float
    #: What the classes of the outputs are called, if the model says so.
    labels: tuple[str, ...] = ()

    def top(self, k: int = 5, output: str | None = None) -> list[list[tuple[str, float]]]:
        """Of each row the `k` classes with the largest values, the largest first: label, value.

        `output`: the one that has a value for each label; by default the first that does. Raises
        ValueError: the model has no labels, or no such output.
        """
        if not self.labels:
            raise ValueError("the model tells no labels; expected labels in its model.toml")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        names = list(self.outputs) if output is None else [output]
        for name in names:
            scores = self.outputs.get(name)
            if (
                scores is not None
                and scores.ndim == 2
                and scores.shape[1] == len(self.labels)
                and scores.dtype.kind in "fiu"
            ):
                # NaN is sorted behind all else.
                best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :k]
                return [
                    [(self.labels[place], float(row[place])) for place in places]
                    for row, places in zip(scores, best, strict=True)
                ]
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in self.outputs.items())
        raise ValueError(
            f"output is {output!r}; expected one with a column for each of {len(self.labels)} "
            f"labels (there are {shapes})"
        )


Outcome = Result | InferqError


class Host(Protocol):
    """What a pending request may ask of its client."""

    def is_served(self, model: str) -> bool:
        """Whether a worker that serves `model` was alive when last asked."""
        ...


class Watcher(Protocol):
    """Is told when a pending request is resolved."""

    def resolved(self, pending: PendingRequest) -> None: ...
    def forked(self) -> None:
        """This process was forked: threads that were inside `resolved` do not exist here."""


class PendingRequest:
    """A request that was submitted. A client makes it, not its users."""

    __slots__ = (
        "_host", "_outcome", "_waiters", "accepted", "labels", "model", "outgoing", "parts",
        "request_id", "submitted_at", "watcher",
    )  # fmt: skip

    def __init__(self, host: Host, outgoing: Outgoing, submitted_at: float) -> None:
        self._host = host
        self._outcome: Outcome | None = None
        self._waiters: list[Callable[[], None]] = []
        self.request_id = outgoing.request_id
        self.model = outgoing.model
        #: What to push again if Redis loses it; dropped once the request is resolved.
        self.outgoing: Outgoing | None = outgoing
        #: `time.monotonic` seconds.
        self.submitted_at = submitted_at
        self.watcher: Watcher | None = None
        #: What the classes of the model's outputs are called.
        self.labels: tuple[str, ...] = ()
        #: What it was split into, for it has more rows than a batch; empty: it was not.
        self.parts: Sequence[PendingRequest] = ()
        #: Whether Redis has answered its push.
        self.accepted = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.request_id} of {self.model!r}: {self.state}>"

    @property
    def state(self) -> State:
        """See `State`. Asks Redis nothing."""
        outcome = self._outcome
        if outcome is None:
            return State.QUEUED if self._host.is_served(self.model) else State.QUEUED_NO_WORKER
        if isinstance(outcome, Result):
            return State.DONE
        return State.CANCELLED if isinstance(outcome, Cancelled) else State.FAILED

    def done(self) -> bool:
        """Whether `result` would return, or raise the request's error, at once."""
        return self._outcome is not None

    @property
    def nbytes(self) -> int:
        """Bytes that pushing it sends; 0 once it is resolved."""
        if self.outgoing is None:
            return sum(part.nbytes for part in self.parts)
        return self.outgoing.nbytes

    @property
    def outcome(self) -> Outcome | None:
        """The result, or the error, which is not raised; None while there is neither."""
        return self._outcome

    def resolve(self, outcome: Outcome) -> None:
        """Give this request its outcome and wake who waits for it. The first outcome stays."""
        if self._outcome is not None:
            return
        self._outcome = outcome
        self.outgoing = None
        for wake in tuple(self._waiters):
            wake()
        if self.watcher is not None:
            self.watcher.resolved(self)

    def get(self) -> Result:
        """The result at once, or its error; ResultTimeout if there is neither yet."""
        outcome = self._outcome
        if isinstance(outcome, Result):
            return outcome
        raise outcome if outcome is not None else self.overdue()

    def overdue(self) -> ResultTimeout:
        """The error that a caller gets who stops waiting now."""
        waited = time.monotonic() - self.submitted_at
        return ResultTimeout(
            f"request {self.request_id} of model {self.model!r} has no result {waited:.3f} s "
            f"after it was submitted; it is {self.state} and goes on",
            state=str(self.state),
        )


class Pending(PendingRequest):
    """A request submitted by `Client.submit`. Any thread may wait for it."""

    __slots__ = ("_cancel",)

    def __init__(
        self, host: Host, outgoing: Outgoing, submitted_at: float, cancel: Callable[[Pending], bool]
    ) -> None:
        super().__init__(host, outgoing, submitted_at)
        self._cancel = cancel

    def result(self, timeout: float | None = DEFAULT_WAIT_S) -> Result:
        """Wait up to `timeout` seconds (None: without bound) and return the result.

        Raises the request's own error, or ResultTimeout, after which one may call again.
        """
        if self._outcome is None:
            waiter = threading.Lock()
            waiter.acquire()
            self._waiters.append(waiter.release)
            # `resolve` sets the outcome before it reads the waiters, so one of the two sees the
            # other.
            if self._outcome is None:
                waiter.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
            if self._outcome is None:
                self._waiters.remove(waiter.release)
        return self.get()

    def cancel(self) -> bool:
        """Cancel the request unless a result is stored. Returns whether it is cancelled.

        A batch that is running already runs on, and its result is dropped. Raises RedisUnavailable.
        """
        return self._cancel(self)


class AsyncPending(PendingRequest):
    """A request submitted by `AsyncClient.submit`. Any task of its loop may wait for it."""

    __slots__ = ("_cancel",)

    def __init__(
        self,
        host: Host,
        outgoing: Outgoing,
        submitted_at: float,
        cancel: Callable[[AsyncPending], Awaitable[bool]],
    ) -> None:
        super().__init__(host, outgoing, submitted_at)
        self._cancel = cancel

    async def result(self, timeout: float | None = DEFAULT_WAIT_S) -> Result:
        """Like `Pending.result`."""
        if self._outcome is None:
            event = asyncio.Event()
            self._waiters.append(event.set)
            try:
                async with asyncio.timeout(timeout):
                    await event.wait()
            except TimeoutError:
                pass
            finally:
                self._waiters.remove(event.set)
        return self.get()

    async def cancel(self) -> bool:
        """Like `Pending.cancel`."""
        return await self._cancel(self)
