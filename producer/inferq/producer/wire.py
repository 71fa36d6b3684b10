"""One connection of the sync client: for calls, and for Redis' pushes.

A RESP3 connection that has subscribed also takes commands, so one is enough for all results.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

import redis

from inferq.shared.connect import SOCKET_TIMEOUT_S
from inferq.shared.replies import GeneralParser, Replies, decrypted, ignore
from inferq.shared.resp import Command, Reply, open_socket, pack, send_all


class Wire:
    """A connection. One thread at a time uses it; `interrupt` may be called from any.

    `on_push` gets each RESP3 push: messages of subscribed channels. Once a wire has raised one of
    `BROKEN` it cannot be used again.
    """

    def __init__(self, client: redis.Redis, on_push: Callable[[list[Any]], None] = ignore) -> None:
        self._client = client
        self._replies = Replies(GeneralParser(), on_push)
        self._poll = select.poll()
        self._sock: socket.socket | None = None
        self.used_at = 0.0

    def open(self) -> None:
        """Connect and shake hands. Raises one of BROKEN."""
        self._sock = open_socket(self._client, SOCKET_TIMEOUT_S)
        self._poll.register(self._sock, select.POLLIN)

    def send(self, commands: Sequence[Command]) -> socket.socket:
        """Write `commands`, which have no replies."""
        sock = self._sock
        if sock is None:
            raise redis.ConnectionError("the connection is closed")
        send_all(sock, pack(commands).pieces)
        return sock

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Write `commands` at once and return their replies, ReplyErrors among them."""
        sock = self.send(commands)
        replies = self._replies.read(sock, len(commands))
        self._replies.drain()  # pushes that came along, or `listen` would wait for more
        return replies

    def listen(self, seconds: float) -> None:
        """Wait up to `seconds` for pushes (0: do not wait), and hand what came to `on_push`."""
        sock = self._sock
        if sock is None:
            raise redis.ConnectionError("the connection is closed")
        if decrypted(sock) or self._poll.poll(max(0.0, seconds) * 1000):
            self._replies.receive(sock)

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
