"""The asyncio twin of `session` and `listener`: one connection, kept open by one task."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import redis

from inferq.producer.async_wire import AsyncWire
from inferq.producer.core import CLOSED, MAX_BACKOFF_S, REFUSED, SWEEP_S, Core
from inferq.producer.dialogue import (
    Dialogue,
    T,
    ask_about_models,
    cancel,
    carry_async,
    greet,
    read,
    resume,
    sweep,
)
from inferq.producer.outgoing import Outgoing
from inferq.producer.pending import AsyncPending
from inferq.producer.wires import unavailable
from inferq.shared.connect import CONNECT_TIMEOUT_S, async_redis_client
from inferq.shared.errors import ClientClosed, InferqError, RedisUnavailable
from inferq.shared.resp import BROKEN, Command, Reply
from inferq.shared.settings import Settings
from inferq.shared.tls_mistakes import PROBE_S

_log: Final = logging.getLogger(__name__)
#: Seconds that `close` waits for replies.
CLOSE_S: Final = 2.0
#: Seconds after which it cancels its task once more.
CANCEL_S: Final = 0.1


class AsyncSession:
    """Connects when first used, and belongs to the event loop that runs then."""

    def __init__(self, settings: Settings) -> None:
        self._redis = async_redis_client(
            settings.redis_url, sentinel_master=settings.sentinel_master
        )
        self.core = Core(settings)
        # A handshake may fail only at its end; finding out why takes further time.
        over_tls = settings.redis_url.startswith("rediss://")
        self._connect_s = CONNECT_TIMEOUT_S + (3 * PROBE_S if over_tls else 0.0)
        self._wire: AsyncWire | None = None
        self._task: asyncio.Task[None] | None = None
        #: Resolved with the next attempt to connect: None, or why it failed.
        self._attempt: asyncio.Future[InferqError | None] | None = None
        self._settled: list[str] = []
        self._news = asyncio.Event()

    async def carry(self, dialogue: Dialogue[T]) -> T:
        """Have a dialogue with Redis. Raises RedisUnavailable."""
        return await carry_async(dialogue, self._call)

    def make(self, outgoing: Outgoing, now: float) -> AsyncPending:
        """See `Core.build`."""
        return AsyncPending(self.core, outgoing, now, self._cancel)

    async def _cancel(self, pending: AsyncPending) -> bool:
        return await self.carry(cancel(self.core, pending))

    async def close(self) -> None:
        """See `Session.close`. Waits up to CLOSE_S for replies that are on their way."""
        self.core.end(CLOSED)
        if self._wire is not None:
            await self._wire.quiet(CLOSE_S)
        self._attempted(ClientClosed(REFUSED))
        while self._task is not None and not self._task.done():
            self._task.cancel()
            # redis-py swallows a cancellation that comes while it shakes hands.
            await asyncio.wait([self._task], timeout=CANCEL_S)

    async def _call(self, commands: Sequence[Command]) -> list[Reply]:
        wire = await self._connected()
        try:
            return await wire.call(commands)
        except redis.TimeoutError as problem:
            raise unavailable(problem) from problem
        except BROKEN:
            pass  # it broke since it was last used, which says nothing about Redis now
        if self.core.ended:
            raise ClientClosed(
                "the client was closed while it spoke to Redis; whether Redis has taken what it "
                "sent is not known"
            )
        wire = await self._connected()
        try:
            return await wire.call(commands)
        except BROKEN as problem:
            raise unavailable(problem) from problem

    async def _connected(self) -> AsyncWire:
        if self._wire is not None:
            return self._wire
        self.core.check_open()
        if self._attempt is None:
            self._attempt = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="inferq-connection")
        try:
            async with asyncio.timeout(self._connect_s):
                problem = await asyncio.shield(self._attempt)
        except TimeoutError as late:
            raise RedisUnavailable("Redis cannot be reached: no connection in time") from late
        if problem is not None:
            raise problem
        return await self._connected()

    def _attempted(self, problem: InferqError | None) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.set_result(problem)

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        finally:  # cancelled by `close` or somebody else: nobody may wait any longer
            self.core.end("the task that reads results was cancelled; the request goes on")
            self._attempted(ClientClosed(REFUSED))

    async def _keep_connected(self) -> None:
        backoff = 0.0
        while not self.core.ended:
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
            connected = False
            wire = AsyncWire(self._redis, self._on_push, self._on_broken)
            try:
                await wire.open()
                wire.send([("SUBSCRIBE", self.core.channel)])
                # The confirmation is a push. It comes before the replies to the next commands.
                await carry_async(greet(self.core), wire.call)
                self._wire, connected = wire, True
                self._attempted(None)
                await carry_async(resume(self.core), wire.call)
                backoff = 0.0
                await self._serve(wire)
            except (*BROKEN, InferqError) as problem:
                if not connected:
                    known = problem if isinstance(problem, InferqError) else unavailable(problem)
                    self._attempted(known)
                _log.warning("connection to Redis lost, reconnecting: %s", problem)
            except Exception:  # noqa: BLE001  or all callers would wait
                _log.exception("connection to Redis failed, reconnecting")
            finally:
                self._wire = None
                await wire.close()
            backoff = min(MAX_BACKOFF_S, backoff * 2 or 0.05)

    async def _serve(self, wire: AsyncWire) -> None:
        sweep_at = time.monotonic() + SWEEP_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(sweep_at - time.monotonic()):
                    await self._news.wait()
            patience = self.core.patience_s(len(self._settled)) if self._settled else 0.0
            if patience:
                await asyncio.sleep(patience)
            self._news.clear()
            wire.check()
            settled, self._settled = self._settled, []
            await carry_async(read(self.core, settled), wire.call)
            if time.monotonic() >= sweep_at:
                await carry_async(sweep(self.core), wire.call)
                await carry_async(ask_about_models(self.core), wire.call)
                sweep_at = time.monotonic() + SWEEP_S

    def _on_push(self, push: Sequence[Any]) -> None:
        settled = self.core.settled_ids(push)
        if settled:
            self._settled += settled
            self._news.set()

    def _on_broken(self) -> None:
        self._wire = None
        self._news.set()
