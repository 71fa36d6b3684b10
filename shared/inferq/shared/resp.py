"""Redis' protocol (RESP3) on a socket of our own; clients and workers use it.

redis-py opens a connection (TLS, ACL, Sentinel, the handshake). From then on the socket is ours:
redis-py takes three to five times as much CPU for a command, and the data plane must wait for Redis
and for its lanes at once. Only this module takes redis-py's private socket.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

import hiredis
import msgspec
import redis

Command = tuple[bytes | str | int | float, ...]
Reply = Any

#: What redis-py or the socket raises when a connection breaks.
BROKEN: Final = (OSError, redis.RedisError)
NOTHING: Final = object()
#: Longer arguments of a command are written without copying them.
_COPY_BYTES: Final = 16 * 1024
#: Pieces with fewer bytes in total are joined before they are written.
_JOIN_BYTES: Final = 64 * 1024
#: Only for a socket without a Python timeout: there the kernel waits.
_ALL: Final = socket.MSG_WAITALL
#: Pieces that one `sendmsg` takes (IOV_MAX).
_PIECES: Final = 1024


class Packed(msgspec.Struct, frozen=True, gc=False):
    """Encoded commands: their bytes, in few pieces, and the number of commands."""

    pieces: list[bytes]
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(len, self.pieces))


class ReplyError(Exception):
    """Redis answered one command with an error; it takes the place of the reply."""


def new_reader() -> Any:
    """A parser of replies; errors are ReplyError instances; `NOTHING` means: feed more bytes."""
    return hiredis.Reader(
        notEnoughData=NOTHING, replyError=ReplyError, protocolError=redis.ConnectionError
    )


def pack(commands: Sequence[Command]) -> Packed:
    """`commands` as bytes, in few pieces; large arguments are pieces of their own, not copied."""
    out: list[bytes] = []
    small: list[bytes] = []
    for command in commands:
        for part in command:
            if part.__class__ is bytes and len(part) > _COPY_BYTES:
                break
        else:
            small.append(hiredis.pack_command(command))
            continue
        for piece in _pack_large(command):
            if len(piece) > _COPY_BYTES:
                out += (b"".join(small), piece)
                small = []
            else:
                small.append(piece)
    if small:
        out.append(b"".join(small))
    return Packed(out, len(commands))


def unpack(packed: Packed) -> list[Command]:
    """The commands that `packed` was made of, each word as bytes."""
    reader = hiredis.Reader()
    for piece in packed.pieces:
        reader.feed(piece)
    return [tuple(reader.gets()) for _ in range(packed.count)]


def _pack_large(command: Command) -> Iterator[bytes]:
    yield b"*%d\r\n" % len(command)
    for part in command:
        data = part if isinstance(part, bytes) else str(part).encode()
        yield b"$%d\r\n" % len(data)
        yield data
        yield b"\r\n"


def send_all(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    """`sock.sendall` for many pieces, without joining large ones."""
    if isinstance(sock, ssl.SSLSocket):
        for piece in pieces:
            sock.sendall(piece)
        return
    if len(pieces) == 1 or sum(map(len, pieces)) <= _JOIN_BYTES:
        sock.sendall(b"".join(pieces))
        return
    left = deque(memoryview(piece) for piece in pieces if piece)
    while left:
        sent = sock.sendmsg(tuple(islice(left, _PIECES)))
        while left and sent >= len(left[0]):
            sent -= len(left.popleft())
        if sent:
            left[0] = left[0][sent:]


def first_error(replies: Sequence[Reply]) -> ReplyError | None:
    """The first error among replies, if any."""
    return next((reply for reply in replies if isinstance(reply, ReplyError)), None)


def receive(sock: socket.socket, into: memoryview, *, whole: bool = False) -> int:
    """Receive some bytes (or, if `whole`, as many as `into` holds); return how many came.

    Raises one of BROKEN: TimeoutError, or ConnectionError if the other side closed.
    """
    flags = _ALL if whole and not isinstance(sock, ssl.SSLSocket) else 0
    try:
        count = sock.recv_into(into, 0, flags)
    except BlockingIOError:
        raise TimeoutError("Redis did not answer in time") from None
    if not count:
        raise redis.ConnectionError("Redis closed the connection")
    return count


def open_socket(client: redis.Redis, timeout: float) -> socket.socket:
    """A connected, authenticated RESP3 socket. Each wait on it ends after `timeout` seconds.

    Raises one of BROKEN.
    """
    pool = client.connection_pool
    connection: Any = pool.connection_class(**pool.connection_kwargs)
    connection.connect()
    # From here on the socket is ours: redis-py would shut it down when collected.
    sock: socket.socket | None = getattr(connection, "_sock", None)
    if sock is None:
        raise redis.ConnectionError("the connection has no socket")
    connection._sock = None
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(timeout)
        return sock
    # The kernel keeps the timeouts: Python's own take one more system call for each recv and send,
    # and with them no recv can wait for all of a large payload.
    seconds, rest = divmod(timeout, 1)
    limit = struct.pack("ll", int(seconds), int(rest * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    sock.settimeout(None)
    return sock
