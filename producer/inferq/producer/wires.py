"""The idle connections of a sync client, for calls from any of its threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import redis

from inferq.producer.wire import Wire
from inferq.shared.errors import RedisUnavailable
from inferq.shared.resp import BROKEN, Command, Reply

#: Seconds after which an idle connection is replaced rather than used.
STALE_S: Final = 15.0


class Wires:
    """A stack of idle connections; a call takes one, or opens one, and puts it back."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._idle: deque[Wire] = deque()
        self._closed = False

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """The replies to `commands`. RedisUnavailable if there are none.

        They are sent again on a new connection if an old one turns out to be broken. So executing
        them twice must do no harm.
        """
        wire = self._take_idle()
        if wire is not None:
            try:
                return self._call_on(wire, commands)
            except TimeoutError as problem:
                raise unavailable(problem) from problem
            except BROKEN:
                pass  # it broke since it was last used, which says nothing about Redis now
        try:
            wire = Wire(self._client)
            wire.open()
            return self._call_on(wire, commands)
        except BROKEN as problem:
            raise unavailable(problem) from problem

    def _call_on(self, wire: Wire, commands: Sequence[Command]) -> list[Reply]:
        try:
            replies = wire.call(commands)
        except BaseException:
            wire.close()
            raise
        wire.used_at = time.monotonic()
        self._idle.append(wire)
        if self._closed:
            self.close()
        return replies

    def _take_idle(self) -> Wire | None:
        while True:
            try:
                wire = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - wire.used_at < STALE_S:
                return wire
            wire.close()

    def close(self) -> None:
        """Close the idle connections now, and those in use once they become idle."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                return


def unavailable(problem: Exception) -> RedisUnavailable:
    """RedisUnavailable for one of BROKEN."""
    return RedisUnavailable(f"Redis cannot be reached: {problem}")
