"""Stands between everybody and Redis, with a port for each: cuts, delays and swallows traffic.

Its loop runs in a thread of its own. While Redis is down, a connection is accepted and closed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeVar

HOST = "127.0.0.1"
_CHUNK = 1 << 16
_TIMEOUT_S = 10.0
T = TypeVar("T")


class Proxy:
    """A port of its own for each of `clients`; all lead to Redis at `port`."""

    def __init__(self, port: int, clients: Sequence[str]) -> None:
        self._port = port
        self._clients = list(clients)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy")
        self._servers: dict[str, asyncio.Server] = {}
        self._pairs: set[_Pair] = set()
        self._delays: dict[str, float] = {}
        #: Whose new connections are swallowed too.
        self._silent: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Whose next data plane's connection is to be cut, and how many were.
        self._to_cut: set[str] = set()
        self.cut_while_catching_up = 0

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_S)
        self._loop.close()

    def url(self, client: str) -> str:
        """Redis, as `client` shall see it."""
        return f"redis://{HOST}:{self._servers[client].sockets[0].getsockname()[1]}/0"

    def cut(self, clients: Iterable[str]) -> int:
        """Break all their connections; how many there were. New ones are accepted."""
        return self._do(lambda: sum(pair.abort() for pair in self._of(clients)))

    def delay(self, clients: Iterable[str], delay_s: float) -> None:
        """From now on let each piece of their traffic come later; 0: no longer."""
        self._do(lambda: self._delays.update(dict.fromkeys(clients, delay_s)))

    def cut_catching_up(self, clients: Iterable[str]) -> None:
        """Cut the next connection of each worker's data plane as it settles again.

        Once what it settles first was answered, and if there is more.
        """
        self._do(lambda: self._to_cut.update(clients))

    def swallow(self, clients: Iterable[str]) -> Callable[[], None]:
        """Carry nothing more on the connections that they have now, and end none of them.

        Call what is returned to have them go on, with what was sent meanwhile.
        """
        pairs = self._do(lambda: [pair for pair in self._of(clients) if pair.freeze()])

        def thaw() -> None:
            for pair in pairs:
                pair.open.set()

        return lambda: self._do(thaw)

    def silence(self, clients: Iterable[str]) -> Callable[[], None]:
        """As `swallow`, and the connections that they open from now on as well."""
        wanted = set(clients)
        self._do(lambda: self._silent.update(wanted))
        deliver = self.swallow(wanted)
        later: list[_Pair] = []

        def end() -> None:
            self._silent -= wanted
            later.extend(self._of(wanted))

        def thaw() -> None:
            for pair in later:
                pair.open.set()

        def heal() -> None:
            self._do(end)
            deliver()
            self._do(thaw)

        return heal

    def _do(self, act: Callable[[], T]) -> T:
        async def do() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(_TIMEOUT_S)

    def _of(self, clients: Iterable[str]) -> list[_Pair]:
        wanted = set(clients)
        return [pair for pair in self._pairs if pair.client in wanted]

    async def _listen(self) -> None:
        for client in self._clients:

            async def accepted(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str = client
            ) -> None:
                await self._carry(client, reader, writer)

            self._servers[client] = await asyncio.start_server(accepted, HOST, 0)

    async def _carry(
        self, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(HOST, self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair(client, writer, up_writer)
        if client in self._silent:
            pair.freeze()
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                self._pump(pair, reader, up_writer, upward=True),
                self._pump(pair, up_reader, writer),
            )
        finally:
            self._pairs.discard(pair)
            pair.abort()

    def _is_cut(self, pair: _Pair, chunk: bytes) -> bool:
        """Whether what this connection says is the second that it settles again, and is cut off."""
        if pair.client not in self._to_cut or not pair.catches_up(chunk):
            return False
        if pair.multis == 2:
            self._to_cut.discard(pair.client)
            self.cut_while_catching_up += pair.abort()
        return pair.multis == 2

    async def _pump(
        self,
        pair: _Pair,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        upward: bool = False,
    ) -> None:
        try:
            while chunk := await reader.read(_CHUNK):
                delay_s = self._delays.get(pair.client, 0.0)
                if delay_s:
                    await asyncio.sleep(delay_s)
                await pair.open.wait()
                if upward and self._is_cut(pair, chunk):
                    return
                writer.write(chunk)
                await writer.drain()
            await pair.open.wait()
        except OSError:
            pass
        # What one side has said is carried over before its end is.
        writer.close()

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        for pair in list(self._pairs):
            pair.open.set()
            pair.abort()
        while self._pairs:
            await asyncio.sleep(0.01)


class _Pair:
    """One client's connection and ours to Redis."""

    def __init__(self, client: str, down: asyncio.StreamWriter, up: asyncio.StreamWriter) -> None:
        self.client = client
        self.open = asyncio.Event()
        self.open.set()
        self._writers = (down, up)
        #: MULTIs that it has sent so far; None: it is no data plane's, or has caught up.
        self.multis: int | None = None

    def catches_up(self, chunk: bytes) -> bool:
        """Whether it is a data plane's that settles again, now that it says `chunk`."""
        if b"TRACKING\r\n" in chunk:
            self.multis = 0
        elif b"HKEYS\r\n" in chunk:  # which comes next
            self.multis = None
        if self.multis is not None:
            self.multis += chunk.count(b"\r\nMULTI\r\n")
        return self.multis is not None

    def abort(self) -> bool:
        if not self.open.is_set():  # in a black hole nobody is told
            return False
        for writer in self._writers:
            writer.transport.abort()
        return True

    def freeze(self) -> bool:
        was_open = self.open.is_set()
        self.open.clear()
        return was_open
