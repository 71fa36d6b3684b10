"""Hop 1, for threads: check a request, push it, wait for its arrays.

    with Client("redis://…") as client:
        result = client.infer("magika", {"bytes": array}, timeout=5)

Threads may share one client. A forked child opens its own connections when it uses the client.
Requests submitted before the fork belong to the parent.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Literal, Self, overload

from inferq.producer.bulk import Job, stream
from inferq.producer.dialogue import submit
from inferq.producer.outgoing import Inputs
from inferq.producer.pending import DEFAULT_WAIT_S, Pending, Result
from inferq.producer.session import Session
from inferq.producer.window import Window
from inferq.shared.errors import InferqError
from inferq.shared.settings import Settings


class Client:
    """Access to the queues. Connects when first used.

    `redis_url`: redis://, rediss://, unix:// or Celery's sentinel:// form; by default that of
    INFERQ_REDIS_URL or CELERY_BROKER_URL. `settings` may be given in its place.
    """

    def __init__(self, redis_url: str | None = None, *, settings: Settings | None = None) -> None:
        self._settings = settings or Settings.load(redis_url=redis_url)
        self._session = self._open()
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(
        self,
        model: str,
        inputs: Inputs,
        *,
        priority: int | None = None,
        timeout_ms: float | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Pending:
        """Push one request and return once Redis has it in its queue.

        `inputs`: input name → array of exactly the model's dtype and shape, with 1 … max_batch_size
        rows in dim 0; lists and numbers are converted to the model's dtype. `priority`: 0 (the most
        urgent) to 9; by default the model's. `timeout_ms` counts from now: if it passes before the
        request is computed, the request ends as DeadlineExceeded. `outputs`: the names
        of those that are wanted; by default all.

        Raises, before anything is pushed: ModelNotFound, InvalidInput (naming the input),
        PayloadTooLarge, QueueFull, RedisUnavailable, ClientClosed.
        """
        session = self._session
        dialogue = submit(session.core, model, inputs, priority, timeout_ms, session.make, outputs)
        return session.carry(dialogue)

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        timeout: float | None = DEFAULT_WAIT_S,
        priority: int | None = None,
        timeout_ms: float | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Result:
        """`submit`, and wait up to `timeout` seconds for the result; raises what either raises."""
        return self.submit(
            model, inputs, priority=priority, timeout_ms=timeout_ms, outputs=outputs
        ).result(timeout)

    @overload
    def map(
        self,
        model: str,
        items: Iterable[Inputs],
        *,
        in_flight: int = ...,
        priority: int | None = ...,
        timeout_ms: float | None = ...,
        timeout: float | None = ...,
        return_errors: Literal[False] = ...,
        outputs: Sequence[str] | None = ...,
    ) -> Iterator[Result]: ...
    @overload
    def map(
        self,
        model: str,
        items: Iterable[Inputs],
        *,
        in_flight: int = ...,
        priority: int | None = ...,
        timeout_ms: float | None = ...,
        timeout: float | None = ...,
        return_errors: Literal[True],
        outputs: Sequence[str] | None = ...,
    ) -> Iterator[Result | InferqError]: ...
    def map(
        self,
        model: str,
        items: Iterable[Inputs],
        *,
        in_flight: int = 256,
        priority: int | None = None,
        timeout_ms: float | None = None,
        timeout: float | None = DEFAULT_WAIT_S,
        return_errors: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> Iterator[Result | InferqError]:
        """Submit many requests with few round trips; yield their results in the order of `items`.

        `items` is read as results are taken, so it may be endless: at most `in_flight` requests are
        unresolved at a time. While any of them is, `map` waits for room in a full queue. A failed
        request raises its error at its place, which ends the iteration; with `return_errors` the
        error is yielded there instead. `timeout`: seconds to wait for each next result. Requests in
        flight when the caller leaves the iteration go on, and their results are dropped.
        """
        job = Job(model, priority, timeout_ms, timeout, return_errors, outputs)
        return stream(self._session, job, iter(items), Window(in_flight))

    def close(self) -> None:
        """Stop. Requests without a result end as ClientClosed here; workers still compute them."""
        self._session.close()

    def _open(self) -> Session:
        return Session(self._settings)

    def _forked(self) -> None:
        self._session.abandon()
        self._session = self._open()


#: The clients that are told of a fork.
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._forked()


os.register_at_fork(after_in_child=_after_fork)
