"""The data plane's connection: commands go out together, replies are read in order.

Pushes (RESP3 invalidations of tracked keys) are set aside as they arrive, and `Link.wait` waits for
them and for the process's own lanes at once.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
import redis

from inferq.shared.resp import (
    NOTHING,
    Command,
    Reply,
    ReplyError,
    new_reader,
    open_socket,
    pack,
    send_all,
)

_BUFFER_BYTES: Final = 256 * 1024


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
    further use and is replaced. `on_wake` is called when the waker is set while a reply is waited
    for: what is urgent need not wait for Redis. It may `note` and `flush`, but not `call`.
    """

    def __init__(
        self,
        client: redis.Redis,
        waker: Waker,
        timeout: float,
        on_wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_wake = on_wake
        self._client = client
        self._sock: socket.socket | None = None
        self._waker = waker
        self._timeout = timeout
        self._buffer = bytearray(_BUFFER_BYTES)
        self._notes: list[Command] = []
        #: Replies to come, in this order: passed over, to be read, and passed over behind those.
        self._unread = 0
        self._wanted = 0
        self._unread_later = 0
        #: Keys that Redis has reported as changed since the last `forget_changes`.
        self.changed: set[bytes] = set()
        #: True if Redis reported that any key may have changed (FLUSHALL).
        self.all_changed = False

    def open(self) -> None:
        """Connect and turn key tracking on. Raises one of BROKEN."""
        self._sock = open_socket(self._client, self._timeout)
        self._reader = new_reader()
        (reply,) = self.call([("CLIENT", "TRACKING", "ON", "NOLOOP")])
        if isinstance(reply, ReplyError):
            raise redis.ConnectionError(f"CLIENT TRACKING was refused: {reply}")

    def close(self) -> None:
        """Close the socket; never raises."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def note(self, command: Command) -> None:
        """Have `command` written with what is written next; its reply will be passed over."""
        self._notes.append(command)

    def flush(self) -> None:
        """Write what was noted, without waiting."""
        if self._notes:
            self.post([])

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Write `commands` at once and return their replies, ReplyErrors among them."""
        self.post(commands)
        return self.read(len(commands))

    def post(self, commands: Sequence[Command]) -> None:
        """Write what was noted, and `commands`, whose replies are to be `read`."""
        notes, self._notes = self._notes, []
        send_all(self._socket, pack([*notes, *commands]))
        if self._wanted:
            self._unread_later += len(notes)
        else:
            self._unread += len(notes)
        self._wanted += len(commands)

    @property
    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise redis.ConnectionError("the link is closed")
        return self._sock

    def read(self, count: int) -> list[Reply]:
        """The next `count` replies that were not passed over."""
        replies: list[Reply] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is NOTHING:
                self.await_readable(self._socket)
                self._receive()
            elif isinstance(reply, hiredis.PushNotification):
                self._note(reply)
            elif self._unread:
                self._unread -= 1
            else:
                replies.append(reply)
        self._wanted -= count
        if not self._wanted:
            self._unread, self._unread_later = self._unread + self._unread_later, 0
        return replies

    def await_readable(self, sock: socket.socket) -> None:
        """Until `sock` can be read; calls `on_wake` when the waker is set meanwhile.

        TimeoutError if Redis does not answer in time.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            readable, woken = self._poll(sock, deadline - time.monotonic())
            if woken:
                self._on_wake()
            if readable:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"Redis did not answer within {self._timeout:g} s")

    def _poll(self, sock: socket.socket, seconds: float) -> tuple[bool, bool]:
        """Wait for `sock` and the waker: which of them is ready. Clears the waker."""
        pending = getattr(sock, "pending", None)  # TLS: decrypted, not yet read
        if pending is not None and pending():
            return True, False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self._waker.fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}
        woken = self._waker.fd in ready
        if woken:
            self._waker.clear()
        return sock.fileno() in ready, woken

    def forget_changes(self) -> None:
        """Start anew to collect changed keys."""
        self.changed.clear()
        self.all_changed = False

    def wait(self, seconds: float) -> None:
        """Until a key changed, the waker was set, or `seconds` have passed."""
        self._drain()  # a push may have come in behind, or among, replies that were read
        if self.changed or self.all_changed:
            return
        readable, _ = self._poll(self._socket, seconds)
        if readable:
            self._receive()
        self._drain()

    def _drain(self) -> None:
        while (reply := self._reader.gets()) is not NOTHING:
            if isinstance(reply, hiredis.PushNotification):
                self._note(reply)
            else:
                self._unread -= 1

    def _receive(self) -> None:
        count = self._socket.recv_into(self._buffer)
        if not count:
            raise redis.ConnectionError("Redis closed the connection")
        self._reader.feed(self._buffer, 0, count)

    def _note(self, push: list[Any]) -> None:
        if push and push[0] == b"invalidate":
            if push[1] is None:
                self.all_changed = True
            else:
                self.changed.update(push[1])
