"""`map`: pushes many requests in blocks, a bounded number in flight; yields results in order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from inferq.producer.async_session import AsyncSession
from inferq.producer.core import Core
from inferq.producer.dialogue import Dialogue, look_up, push
from inferq.producer.outgoing import PUSH_BLOCK, Inputs
from inferq.producer.pending import AsyncPending, Pending, PendingRequest, Result
from inferq.producer.session import Session
from inferq.producer.window import BLOCK_AGE_S, BLOCK_BYTES, Window
from inferq.shared.errors import InferqError, QueueFull, RedisUnavailable

P = TypeVar("P", bound=PendingRequest)


@dataclass(frozen=True)
class Job:
    """What one run of `map` was asked to do; see `Client.map`."""

    model: str
    priority: int | None
    timeout_ms: float | None
    timeout: float | None
    return_errors: bool
    outputs: Sequence[str] | None = None

    def judge(self, outcome: Result | InferqError) -> Result | InferqError:
        """Return `outcome` if it is to be yielded at its place, or raise it."""
        if isinstance(outcome, InferqError) and not self.return_errors:
            raise outcome
        return outcome


def stream(
    session: Session, job: Job, source: Iterator[Inputs], window: Window[Pending]
) -> Iterator[Result | InferqError]:
    """See `Client.map`."""
    more, since = True, time.monotonic()
    try:
        while more or window.order:
            if more and window.wants_block():
                block, more = _take(source, window)
                session.carry(_submit(session.core, job, window, block, session.make))
            elif window.head_ready():
                yield job.judge(window.pop())
                since = time.monotonic()
            elif not _wait(window, more, job.timeout, since):
                session.core.drop(*window.overdue())
    finally:
        for left in window.leave():
            session.core.drop(left)


async def stream_async(
    session: AsyncSession,
    job: Job,
    source: Iterator[Inputs] | AsyncIterator[Inputs],
    window: Window[AsyncPending],
) -> AsyncIterator[Result | InferqError]:
    """See `AsyncClient.map`."""
    more, since = True, time.monotonic()
    try:
        while more or window.order:
            if more and window.wants_block():
                if isinstance(source, AsyncIterator):
                    block, more = await _take_async(source, window)
                else:
                    block, more = _take(source, window)
                await session.carry(_submit(session.core, job, window, block, session.make))
            elif window.head_ready():
                yield job.judge(window.pop())
                since = time.monotonic()
            elif not await _wait_async(window, more, job.timeout, since):
                session.core.drop(*window.overdue())
    finally:
        for left in window.leave():
            session.core.drop(left)


def _take(source: Iterator[Inputs], window: Window[P]) -> tuple[list[Inputs], bool]:
    """The next inputs to submit, and whether there may be more; never waits long for a block."""
    if window.held:
        return window.unhold(), True
    block: list[Inputs] = []
    until = time.monotonic() + BLOCK_AGE_S
    for item in source:
        block.append(item)
        if len(block) >= window.block or time.monotonic() > until:
            return block, True
    return block, False


async def _take_async(
    source: AsyncIterator[Inputs], window: Window[P]
) -> tuple[list[Inputs], bool]:
    """The twin of `_take`."""
    if window.held:
        return window.unhold(), True
    block: list[Inputs] = []
    until = time.monotonic() + BLOCK_AGE_S
    async for item in source:
        block.append(item)
        if len(block) >= window.block or time.monotonic() > until:
            return block, True
    return block, False


def _submit(  # noqa: C901 - one loop; each error has its own consequence for the block
    core: Core, job: Job, window: Window[P], block: Sequence[Inputs], make: Callable[..., P]
) -> Dialogue[None]:
    """Submit as much of `block` as there is room for, in order; the window holds the rest."""
    items = deque(block)
    ready: list[PendingRequest] = []
    size = 0
    asked_anew = False
    while items and window.room > 0:
        try:
            view = yield from look_up(core, job.model)
            pending = core.build(view, items[0], job.priority, job.timeout_ms, make, job.outputs)
        except QueueFull as problem:
            if window.unresolved:
                break
            if asked_anew:
                items.popleft()
                window.fail(problem)
            # What is known may be old: it counts our pushes, but not what workers have claimed
            # since.
            core.admission.expire(job.model)
            asked_anew = not asked_anew
        except RedisUnavailable as problem:
            for _ in items:
                window.fail(problem)
            items.clear()
        except InferqError as problem:
            items.popleft()
            window.fail(problem)
        else:
            items.popleft()
            window.enter(pending)
            ready += pending.parts or (pending,)
            size += pending.nbytes
            if size > BLOCK_BYTES or len(ready) > PUSH_BLOCK:
                yield from push(core, ready, view)
                ready, size = [], 0
    if ready:
        yield from push(core, ready, view)
    if items:
        window.hold(items)


def _left(timeout: float | None, since: float) -> float | None:
    return None if timeout is None else max(0.0, since + timeout - time.monotonic())


def _wait(window: Window[P], more: bool, timeout: float | None, since: float) -> bool:
    """Wait until there is something to do; False if the timeout passes first."""
    waiter = threading.Lock()
    waiter.acquire()
    if not window.arm(waiter.release, more=more):
        return True
    left = _left(timeout, since)
    return waiter.acquire(timeout=-1 if left is None else left)


async def _wait_async(window: Window[P], more: bool, timeout: float | None, since: float) -> bool:
    """The twin of `_wait`."""
    event = asyncio.Event()
    if not window.arm(event.set, more=more):
        return True
    try:
        async with asyncio.timeout(_left(timeout, since)):
            await event.wait()
    except TimeoutError:
        return False
    return True
