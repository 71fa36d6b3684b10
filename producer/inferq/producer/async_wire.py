"""The asyncio twin of `wire`: one RESP3 connection that many tasks share.

Tasks write their commands one after another and wait for their own replies; one task reads. So a
client needs a single connection for pushes, results and questions. redis-py opens it. Only this
module uses its streams, which are private in redis-py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
import redis
import redis.asyncio

from inferq.shared.connect import SOCKET_TIMEOUT_S
from inferq.shared.resp import BROKEN, NOTHING, Command, Reply, new_reader, pack

_READ_BYTES: Final = 256 * 1024


class _Call:
    """Replies that one caller waits for."""

    __slots__ = ("future", "replies", "wanted")

    def __init__(self, wanted: int, future: asyncio.Future[list[Reply]]) -> None:
        self.wanted = wanted
        self.replies: list[Reply] = []
        self.future = future


class AsyncWire:
    """A connection. `on_push` gets each RESP3 push, `on_broken` one call when it breaks.

    After a call has raised one of BROKEN the wire is of no further use.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        on_push: Callable[[list[Any]], None],
        on_broken: Callable[[], None],
    ) -> None:
        self._client = client
        self._on_push = on_push
        self._on_broken = on_broken
        self._calls: deque[_Call] = deque()
        self._parser = new_reader()
        self._reading: asyncio.Task[None] | None = None
        self._problem: Exception | None = None

    async def open(self) -> None:
        """Connect, shake hands, start to read. Raises one of BROKEN."""
        pool = self._client.connection_pool
        connection: Any = pool.connection_class(**pool.connection_kwargs)
        await connection.connect()
        # From here on the stream is ours: redis-py would close what it still held when collected.
        self._stream: asyncio.StreamReader = connection._reader
        self._writer: asyncio.StreamWriter = connection._writer
        connection._reader = connection._writer = None
        self._reading = asyncio.create_task(self._read(), name="inferq-results")

    def send(self, commands: Sequence[Command]) -> None:
        """Write `commands`, which have no replies."""
        self.check()
        self._writer.writelines(pack(commands).pieces)

    def check(self) -> None:
        """Raise what broke the connection, if it is broken."""
        if self._problem is not None:
            raise self._problem

    async def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Write `commands` at once and return their replies, ReplyErrors among them."""
        self.send(commands)
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._calls.append(_Call(len(commands), future))
        try:
            async with asyncio.timeout(SOCKET_TIMEOUT_S):
                await self._writer.drain()
                return await future
        except TimeoutError:
            problem = redis.TimeoutError(f"no reply within {SOCKET_TIMEOUT_S} s")
            self._break(problem)
            raise problem from None
        except OSError as problem:
            self._break(problem)
            raise

    async def quiet(self, seconds: float) -> None:
        """Wait up to `seconds` until all calls made so far are answered. Never raises."""
        if self._calls:
            await asyncio.wait([call.future for call in self._calls], timeout=seconds)

    async def _read(self) -> None:
        try:
            while True:
                data = await self._stream.read(_READ_BYTES)
                if not data:
                    raise redis.ConnectionError("Redis closed the connection")
                self._parser.feed(data)
                while (reply := self._parser.gets()) is not NOTHING:
                    if isinstance(reply, hiredis.PushNotification):
                        self._on_push(reply)
                    else:
                        self._answer(reply)
        except BROKEN as problem:
            self._break(problem)
        except Exception as problem:  # noqa: BLE001  or nobody would read on
            self._break(redis.ConnectionError(f"a reply cannot be read: {problem!r}"))

    def _answer(self, reply: Reply) -> None:
        call = self._calls[0]
        call.replies.append(reply)
        if len(call.replies) == call.wanted:
            self._calls.popleft()
            if not call.future.done():
                call.future.set_result(call.replies)

    def _break(self, problem: Exception) -> None:
        if self._problem is not None:
            return
        self._problem = problem
        self._writer.close()
        while self._calls:
            future = self._calls.popleft().future
            if not future.done():
                future.set_exception(problem)
        self._on_broken()

    async def close(self) -> None:
        """Close the socket, stop reading. Never raises."""
        if self._reading is not None:
            self._break(redis.ConnectionError("the connection is closed"))
            self._reading.cancel()
            await asyncio.wait([self._reading])
