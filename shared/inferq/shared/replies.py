"""How inferq's connections read: one loop, for replies in their order and for pushes.

A parser decides what the bytes become: hiredis makes objects of them; the reader of payloads has
the kernel write them into arrays.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

import hiredis

from inferq.shared.resp import NOTHING, Reply, new_reader, receive

_BUFFER_BYTES: Final = 256 * 1024
_PUSH: Final = hiredis.PushNotification


class Parser(Protocol):
    """Makes replies of bytes."""

    @property
    def gets(self) -> Callable[[], Reply]:
        """The next reply; `NOTHING`: call `receive` first."""
        ...

    def receive(self, sock: socket.socket) -> None:
        """Wait for bytes and take them in. Raises one of resp.BROKEN."""
        ...


class GeneralParser:
    """Replies of any kind; errors are ReplyError instances."""

    def __init__(self) -> None:
        self._reader = new_reader()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self.gets: Callable[[], Reply] = self._reader.gets

    def receive(self, sock: socket.socket) -> None:
        self._reader.feed(self._buffer, 0, receive(sock, self._view))


def ignore(_: Any) -> None:
    """A callback that does nothing."""


class Replies:
    """What one connection reads. One thread at a time uses it.

    `on_push` gets each RESP3 push, in its place among the replies; `on_passed_over` gets each reply
    that nobody reads. Once one of resp.BROKEN was raised it cannot be used again.
    """

    def __init__(
        self,
        parser: Parser,
        on_push: Callable[[list[Any]], None] = ignore,
        on_passed_over: Callable[[Reply], None] = ignore,
    ) -> None:
        self._parser = parser
        self._on_push = on_push
        self._on_passed_over = on_passed_over
        #: Replies that come next and are passed over.
        self._unread = 0

    def pass_over(self, count: int) -> None:
        """Note that `count` commands were written whose replies nobody will read."""
        self._unread += count

    def read(self, sock: socket.socket, count: int) -> list[Reply]:
        """The next `count` replies that are not passed over, ReplyErrors among them."""
        gets = self._parser.gets
        replies: list[Reply] = []
        while len(replies) < count:
            reply = gets()
            if reply is NOTHING:
                self._parser.receive(sock)
            elif reply.__class__ is _PUSH:
                self._on_push(reply)
            elif self._unread:
                self._unread -= 1
                self._on_passed_over(reply)
            else:
                replies.append(reply)
        return replies

    def drain(self) -> None:
        """Handle what has been received already: pushes, and replies that nobody reads."""
        gets = self._parser.gets
        while (reply := gets()) is not NOTHING:
            if reply.__class__ is _PUSH:
                self._on_push(reply)
            else:
                self._unread -= 1
                self._on_passed_over(reply)

    def receive(self, sock: socket.socket) -> None:
        """Read what a readable socket holds, and handle it."""
        try:
            self._parser.receive(sock)
        except TimeoutError:  # TLS: what came was no application data
            return
        self.drain()


def decrypted(sock: socket.socket) -> bool:
    """Whether TLS holds bytes that it has read off the socket; poll does not report these."""
    pending = getattr(sock, "pending", None)
    return pending is not None and pending() > 0
