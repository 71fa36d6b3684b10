"""One RESP3 connection, driven by hand: commands go out together, replies are read in order.

redis-py opens it (TLS, ACL, Sentinel, the handshake). From then on the socket is ours, because
redis-py's own way costs three to five times as much CPU for a command, and because a RESP3
connection that is subscribed can also be asked. What is private of redis-py, the socket, is used
here and in `async_wire` alone.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import hiredis
import redis

from inferq.shared.connect import SOCKET_TIMEOUT_S

Command = tuple[bytes | str | int | float, ...]
Reply = Any

#: How a connection breaks: what redis-py or the socket raises.
BROKEN: Final = (OSError, redis.RedisError)
NOTHING: Final = object()
#: Longer arguments of a command are written from where they stand.
_COPY_BYTES: Final = 16 * 1024
#: Pieces that one `sendmsg` takes (IOV_MAX).
_PIECES: Final = 1024


class ReplyError(Exception):
    """Redis answered one command with an error; it stands where the reply would stand."""


def new_reader() -> Any:
    """A parser of replies; errors are ReplyError instances, `NOTHING` means: feed me more."""
    return hiredis.Reader(
        notEnoughData=NOTHING, replyError=ReplyError, protocolError=redis.ConnectionError
    )


def pack(commands: Sequence[Command]) -> list[bytes]:
    """`commands` as bytes, in few pieces; large arguments are pieces of their own, not copied."""
    out: list[bytes] = []
    small: list[bytes] = []
    for command in commands:
        if any(isinstance(part, bytes) and len(part) > _COPY_BYTES for part in command):
            for piece in _pack_large(command):
                if len(piece) > _COPY_BYTES:
                    out += (b"".join(small), piece)
                    small = []
                else:
                    small.append(piece)
        else:
            small.append(hiredis.pack_command(command))
    out.append(b"".join(small))
    return out


def _pack_large(command: Command) -> Iterator[bytes]:
    yield b"*%d\r\n" % len(command)
    for part in command:
        data = part if isinstance(part, bytes) else str(part).encode()
        yield b"$%d\r\n" % len(data)
        yield data
        yield b"\r\n"


def _send_all(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    """`sock.sendall` for many pieces."""
    left = deque(memoryview(piece) for piece in pieces if piece)
    while left:
        sent = sock.sendmsg(tuple(islice(left, _PIECES)))
        while left and sent >= len(left[0]):
            sent -= len(left.popleft())
        if sent:
            left[0] = left[0][sent:]


def first_error(replies: Sequence[Reply]) -> ReplyError | None:
    """The first command that was refused, if any."""
    return next((reply for reply in replies if isinstance(reply, ReplyError)), None)


class Wire:
    """A connection. One thread at a time uses it; `interrupt` may be called from any.

    `on_push` gets what Redis says unasked (RESP3 pushes: subscribed channels' messages). After
    one of `BROKEN` was raised the wire is of no further use.
    """

    def __init__(
        self, client: redis.Redis, on_push: Callable[[list[Any]], None] | None = None
    ) -> None:
        self._client = client
        self._on_push = on_push
        self._reader = new_reader()
        self._buffer = bytearray(256 * 1024)
        self._view = memoryview(self._buffer)
        self._sock: socket.socket | None = None
        self.used_at = 0.0

    def open(self) -> None:
        """Connect and shake hands. Raises one of BROKEN."""
        pool = self._client.connection_pool
        connection: Any = pool.connection_class(**pool.connection_kwargs)
        connection.connect()
        # Ours from here on: what redis-py still held, it would shut down when collected.
        sock: socket.socket | None = getattr(connection, "_sock", None)
        if sock is None:
            raise redis.ConnectionError("the connection has no socket")
        connection._sock = None
        sock.settimeout(SOCKET_TIMEOUT_S)
        self._sock = sock

    def send(self, commands: Sequence[Command]) -> socket.socket:
        """Write `commands`, which have no replies."""
        sock = self._sock
        if sock is None:
            raise redis.ConnectionError("the connection is closed")
        pieces = pack(commands)
        if len(pieces) == 1 or isinstance(sock, ssl.SSLSocket):
            for piece in pieces:
                sock.sendall(piece)
        else:
            _send_all(sock, pieces)
        return sock

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Write `commands` at once and return their replies, ReplyErrors among them."""
        sock = self.send(commands)
        replies: list[Reply] = []
        wanted = len(commands)
        while len(replies) < wanted:
            reply = self._reader.gets()
            if reply is NOTHING:
                self._receive(sock)
            elif isinstance(reply, hiredis.PushNotification):
                self._pushed(reply)
            else:
                replies.append(reply)
        self._drain()  # what came along: else `listen` would wait for what is here already
        return replies

    def listen(self, seconds: float) -> None:
        """Wait up to `seconds` for pushes (0: do not wait), and hand what came to `on_push`."""
        sock = self._sock
        if sock is None:
            raise redis.ConnectionError("the connection is closed")
        try:
            sock.settimeout(max(0.0, seconds))
            self._receive(sock)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return
        finally:
            sock.settimeout(SOCKET_TIMEOUT_S)
        self._drain()

    def _drain(self) -> None:
        while (push := self._reader.gets()) is not NOTHING:
            self._pushed(push)

    def _pushed(self, push: Any) -> None:
        if self._on_push is not None:
            self._on_push(push)

    def _receive(self, sock: socket.socket) -> None:
        count = sock.recv_into(self._buffer)
        if count == 0:
            raise redis.ConnectionError("Redis closed the connection")
        self._reader.feed(self._view[:count])

    def interrupt(self) -> None:
        """Make a thread that waits on this wire stop, with one of BROKEN. Never raises."""
        sock = self._sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def close(self) -> None:
        """Close the socket. Never raises."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
