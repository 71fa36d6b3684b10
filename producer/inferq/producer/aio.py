"""Hop 1, for asyncio: check a request, push it, await its arrays.

    async with AsyncClient("redis://…") as client:
        result = await client.infer("magika", {"bytes": array}, timeout=5)

One connection carries everything. A client belongs to the event loop that first uses it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Literal, Self, overload

from inferq.producer.async_session import AsyncSession
from inferq.producer.bulk import Job, stream_async
from inferq.producer.dialogue import submit
from inferq.producer.outgoing import Inputs
from inferq.producer.pending import DEFAULT_WAIT_S, AsyncPending, Result
from inferq.producer.window import Window
from inferq.shared.errors import InferqError
from inferq.shared.settings import Settings


class AsyncClient:
    """What `Client` is, for asyncio: same arguments, same results, same errors."""

    def __init__(self, redis_url: str | None = None, *, settings: Settings | None = None) -> None:
        self._settings = settings or Settings.load(redis_url=redis_url)
        self._session = self._open()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def submit(
        self,
        model: str,
        inputs: Inputs,
        *,
        priority: int | None = None,
        timeout_ms: float | None = None,
        outputs: Sequence[str] | None = None,
    ) -> AsyncPending:
        """See `Client.submit`."""
        session = self._session
        dialogue = submit(session.core, model, inputs, priority, timeout_ms, session.make, outputs)
        return await session.carry(dialogue)

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        timeout: float | None = DEFAULT_WAIT_S,
        priority: int | None = None,
        timeout_ms: float | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Result:
        """See `Client.infer`."""
        pending = await self.submit(
            model, inputs, priority=priority, timeout_ms=timeout_ms, outputs=outputs
        )
        return await pending.result(timeout)

    @overload
    def map(
        self,
        model: str,
        items: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        in_flight: int = ...,
        priority: int | None = ...,
        timeout_ms: float | None = ...,
        timeout: float | None = ...,
        return_errors: Literal[False] = ...,
        outputs: Sequence[str] | None = ...,
    ) -> AsyncIterator[Result]: ...
    @overload
    def map(
        self,
        model: str,
        items: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        in_flight: int = ...,
        priority: int | None = ...,
        timeout_ms: float | None = ...,
        timeout: float | None = ...,
        return_errors: Literal[True],
        outputs: Sequence[str] | None = ...,
    ) -> AsyncIterator[Result | InferqError]: ...
    def map(
        self,
        model: str,
        items: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        in_flight: int = 256,
        priority: int | None = None,
        timeout_ms: float | None = None,
        timeout: float | None = DEFAULT_WAIT_S,
        return_errors: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> AsyncIterator[Result | InferqError]:
        """See `Client.map`; `items` may be asynchronous too."""
        job = Job(model, priority, timeout_ms, timeout, return_errors, outputs)
        source = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        return stream_async(self._session, job, source, Window(in_flight))

    async def close(self) -> None:
        """See `Client.close`."""
        await self._session.close()

    def _open(self) -> AsyncSession:
        return AsyncSession(self._settings)
