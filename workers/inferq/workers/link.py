"""One RESP3 connection, driven by hand: commands go out together, replies are read in order.

redis-py opens it (TLS, ACL, Sentinel, the handshake); from then on the data plane owns the socket,
because it must wait for Redis and for its own lanes at once. Pushes (RESP3 invalidations) are set
aside as they arrive. What is private of redis-py, the connection's socket, is used here alone.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final

import hiredis
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

Command = tuple[bytes | str | int | float, ...]
Reply = Any

#: Why a link can break: whatever redis-py or the socket raises.
BROKEN: Final = (OSError, RedisError)
_NOTHING: Final = object()
_BUFFER_BYTES: Final = 256 * 1024


class ReplyError(Exception):
    """Redis answered one command with an error; it stands where the reply would stand."""


class Waker:
    """Lets other threads end a `Link.wait`. Setting it twice is one wake-up."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self.fd)


class Link:
    """A connection of the data plane. Not thread-safe: one thread owns it.

    `timeout` (seconds) bounds every wait for a reply; a link that raises one of BROKEN is of no
    further use and is replaced.
    """

    def __init__(self, client: redis.Redis, waker: Waker, timeout: float) -> None:
        self._connection = client.connection_pool.make_connection()
        self._waker = waker
        self._timeout = timeout
        self._buffer = bytearray(_BUFFER_BYTES)
        self._unread = 0
        #: Keys that Redis has reported as changed since the last `forget_changes`.
        self.changed: set[bytes] = set()
        #: True if Redis reported that any key may have changed (FLUSHALL).
        self.all_changed = False

    def open(self) -> None:
        """Connect and turn key tracking on. Raises one of BROKEN."""
        self._connection.connect()  # type: ignore[no-untyped-call]
        sock: socket.socket | None = getattr(self._connection, "_sock", None)
        if sock is None:
            raise RedisConnectionError("the connection has no socket")
        self._sock = sock
        self._sock.settimeout(self._timeout)
        self._reader = hiredis.Reader(
            notEnoughData=_NOTHING, replyError=ReplyError, protocolError=RedisConnectionError
        )
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        self._poll.register(self._waker.fd, select.POLLIN)
        (reply,) = self.call([("CLIENT", "TRACKING", "ON", "NOLOOP")])
        if isinstance(reply, ReplyError):
            raise RedisConnectionError(f"CLIENT TRACKING was refused: {reply}")

    def close(self) -> None:
        """Close the socket; never raises."""
        self._connection.disconnect()  # type: ignore[no-untyped-call]

    def send(self, commands: Iterable[Command]) -> None:
        """Write `commands` at once, without waiting; their replies will be passed over."""
        self._unread += self._write(commands)

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Write `commands` at once and return their replies, ReplyErrors among them."""
        self._write(commands)
        return self.read(len(commands))

    def post(self, commands: Iterable[Command]) -> None:
        """Write `commands` at once; their replies are to be `read`."""
        self._write(commands)

    def _write(self, commands: Iterable[Command]) -> int:
        packed = [hiredis.pack_command(command) for command in commands]
        self._sock.sendall(b"".join(packed))
        return len(packed)

    def read(self, count: int) -> list[Reply]:
        """The next `count` replies that were not passed over."""
        replies: list[Reply] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is _NOTHING:
                self._receive()
            elif isinstance(reply, hiredis.PushNotification):
                self._note(reply)
            elif self._unread:
                self._unread -= 1
            else:
                replies.append(reply)
        return replies

    def forget_changes(self) -> None:
        """Start anew to collect changed keys."""
        self.changed.clear()
        self.all_changed = False

    def wait(self, seconds: float) -> None:
        """Until a key changed, the waker was set, or `seconds` have passed."""
        self._drain()  # a push may have come in behind, or among, replies that were read
        if self.changed or self.all_changed:
            return
        pending = getattr(self._sock, "pending", None)  # TLS: decrypted, not yet read
        if pending is not None and pending():
            self._receive()
        else:
            for fd, _ in self._poll.poll(max(0.0, seconds) * 1000):
                if fd == self._waker.fd:
                    self._waker.clear()
                else:
                    self._receive()
        self._drain()

    def _drain(self) -> None:
        while (reply := self._reader.gets()) is not _NOTHING:
            if isinstance(reply, hiredis.PushNotification):
                self._note(reply)
            else:
                self._unread -= 1

    def _receive(self) -> None:
        count = self._sock.recv_into(self._buffer)
        if not count:
            raise RedisConnectionError("Redis closed the connection")
        self._reader.feed(self._buffer, 0, count)

    def _note(self, push: list[Any]) -> None:
        if push and push[0] == b"invalidate":
            if push[1] is None:
                self.all_changed = True
            else:
                self.changed.update(push[1])
