"""The data plane's connection: commands go out together, replies are read in order.

Pushes (RESP3 invalidations of tracked keys) are noted as they arrive. `Link.wait` waits for them
and for the process' own lanes at once.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Sequence
from typing import Any

import redis

from inferq.shared.connect import parse_info
from inferq.shared.replies import GeneralParser, Replies, decrypted
from inferq.shared.resp import (
    Command,
    Packed,
    Reply,
    ReplyError,
    open_socket,
    pack,
    send_all,
)
from inferq.workers.claims.wrong_type import is_wrong_type

logger = logging.getLogger(__name__)


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

    `timeout` (seconds) bounds every wait for a reply. A link that raises one of BROKEN cannot be
    used again and is replaced.
    """

    def __init__(self, client: redis.Redis, waker: Waker, timeout: float) -> None:
        self._client = client
        self._sock: socket.socket | None = None
        self._waker = waker
        self._timeout = timeout
        self._poll = select.poll()
        self._replies = Replies(GeneralParser(), self._pushed, self._passed_over)
        self._notes: list[Command] = []
        #: The last out-of-memory error among the replies that were passed over, until it is
        #: cleared.
        self.refused: ReplyError | None = None
        #: The last wrong-type error among them.
        self.wrong_type: ReplyError | None = None
        #: Keys that Redis has reported as changed since the last `forget_changes`.
        self.changed: set[bytes] = set()
        #: Changes with every start of Redis, and with a failover.
        self.run_id = ""
        #: True if Redis reported that any key may have changed (FLUSHALL).
        self.all_changed = False

    def open(self) -> None:
        """Connect and turn key tracking on. Raises one of BROKEN."""
        self._sock = open_socket(self._client, self._timeout)
        self._poll.register(self._sock, select.POLLIN)
        self._poll.register(self._waker.fd, select.POLLIN)
        reply, info = self.call([("CLIENT", "TRACKING", "ON", "NOLOOP"), ("INFO", "server")])
        for each in (reply, info):
            if isinstance(each, ReplyError):
                raise redis.ConnectionError(f"Redis refused to set up the data plane: {each}")
        self.run_id = parse_info(info).get("run_id", "")

    def close(self) -> None:
        """Close the socket; never raises."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def note(self, command: Command) -> None:
        """Write `command` together with whatever is written next. Its reply is passed over."""
        self._notes.append(command)

    def flush(self) -> None:
        """Write what was noted, without waiting."""
        if self._notes:
            self.post()

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Write `commands` at once and return their replies, ReplyErrors among them."""
        self.post(pack(commands))
        return self.read(len(commands))

    def post(self, *parts: Packed) -> None:
        """Write what was noted, then `parts`, whose replies are to be `read`."""
        notes, self._notes = pack(self._notes), []
        send_all(self._socket, [piece for part in (notes, *parts) for piece in part.pieces])
        self._replies.pass_over(notes.count)

    @property
    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise redis.ConnectionError("the link is closed")
        return self._sock

    def read(self, count: int) -> list[Reply]:
        """The next `count` replies that were not passed over."""
        return self._replies.read(self._socket, count)

    def forget_changes(self) -> None:
        """Begin to collect changed keys anew."""
        self.changed.clear()
        self.all_changed = False

    def wait(self, seconds: float) -> None:
        """Wait until a key changed, the waker was set, or `seconds` have passed."""
        sock = self._socket
        self._replies.drain()  # a push may have come in behind, or among, replies that were read
        if self.changed or self.all_changed:
            return
        if decrypted(sock):
            self._replies.receive(sock)
            return
        for fd, _ in self._poll.poll(max(0.0, seconds) * 1000):
            if fd == self._waker.fd:
                self._waker.clear()
            else:
                self._replies.receive(sock)

    def _passed_over(self, reply: Reply) -> None:
        if isinstance(reply, ReplyError):
            if "OOM " in str(reply):
                self.refused = reply
            elif is_wrong_type(reply):
                self.wrong_type = reply
            else:
                logger.error("Redis refused what was noted: %s", reply)

    def _pushed(self, push: list[Any]) -> None:
        if push and push[0] == b"invalidate":
            if push[1] is None:
                self.all_changed = True
            else:
                self.changed.update(push[1])
