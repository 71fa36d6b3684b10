"""Fetches claim-checked tensors: by MGET on a connection of its own, without copying.

A general reader copies each reply twice before it is a Python object. For tensors of hundreds of
kilobytes that is a large part of a request's CPU time. Here the kernel writes into the array
itself.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import redis

from inferq.shared.replies import Replies
from inferq.shared.resp import NOTHING, Reply, open_socket, pack, receive, send_all

_SCRATCH_BYTES: Final = 4096
#: Most keys asked for at once.
_KEYS: Final = 64
#: Most bytes asked for at once, unless it is one key: Redis builds the whole reply in its memory.
_BYTES: Final = 32 * 1024 * 1024
#: A payload may be so many bytes larger than its message says: then the error can give its size.
_SLACK: Final = 64 * 1024


class PayloadReader:
    """One connection, opened when first needed. Not thread-safe.

    `timeout` (seconds) bounds every wait. After `fetch` raised one of resp.BROKEN, the next call
    opens another connection.
    """

    def __init__(self, client: redis.Redis, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._sock: socket.socket | None = None
        self._parser = _InPlace()
        self._replies = Replies(self._parser)

    def fetch(self, sizes: Mapping[str, int], limit: int) -> dict[str, bytes | memoryview | None]:
        """The bytes under the keys of `sizes`, which says how many are expected.

        None: the key is gone, holds more than `limit` bytes, or many more than expected.
        """
        found: dict[str, bytes | memoryview | None] = {}
        try:
            if self._sock is None:
                self._sock = open_socket(self._client, self._timeout)
            for keys in _blocks(sizes):
                self._parser.expect([min(limit, sizes[key] + _SLACK) for key in keys])
                send_all(self._sock, pack([("MGET", *keys)]).pieces)
                found.update(zip(keys, self._replies.read(self._sock, len(keys)), strict=True))
        except BaseException:
            self.close()
            raise
        return found

    def close(self) -> None:
        """Close the connection, if there is one; never raises."""
        sock, self._sock = self._sock, None
        self._parser.clear()
        if sock is not None:
            sock.close()


class _InPlace:
    """A parser of the reply to MGET. The kernel writes the values to their final place."""

    def __init__(self) -> None:
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        #: What was received and not parsed yet: scratch[start:end].
        self._start = self._end = 0
        #: The value that is being read.
        self._value: memoryview | None = None
        #: The part of it that the next bytes fill; None: they go into `_scratch`.
        self._into: memoryview | None = None
        self.gets: Callable[[], Reply] = iter(()).__next__

    def expect(self, limits: Sequence[int]) -> None:
        """The next values have these `limits` in bytes. A larger value becomes None."""
        self.gets = self._values(limits).__next__

    def clear(self) -> None:
        """Forget what was received: the connection is gone."""
        self._start = self._end = 0
        self._value = self._into = None
        self.gets = iter(()).__next__

    def receive(self, sock: socket.socket) -> None:
        into = self._into
        if into is None:
            self._end += receive(sock, self._view[self._end :] if self._end else self._view)
            return
        while (came := receive(sock, into, whole=True)) < len(into):
            into = into[came:]
        self._into = None

    def _values(self, limits: Sequence[int]) -> Iterator[Reply]:
        """Yields the values, and NOTHING whenever bytes are lacking."""
        while (head := self._line()) is None:
            yield NOTHING
        if head != b"*%d" % len(limits):
            raise redis.ResponseError(f"MGET of {len(limits)} payloads answered {head[:200]!r}")
        for limit in limits:
            while (head := self._line()) is None:
                yield NOTHING
            if head in (b"_", b"$-1"):
                yield None
                continue
            if head[:1] != b"$":
                raise redis.ResponseError(f"a payload was answered with {head[:200]!r}")
            size = left = int(head[1:])
            if size <= limit:
                self._begin(size)
                if self._into is not None:
                    yield NOTHING
                left = 0
            left += 2
            while left := self._skip(left):
                yield NOTHING
            yield self._ended()

    def _line(self) -> bytes | None:
        """The next line; None: its end has not been received, and there is room for more."""
        at = self._scratch.find(b"\r\n", self._start, self._end)
        if at < 0:
            if self._start:
                rest = self._scratch[self._start : self._end]
                self._scratch[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            if self._end == _SCRATCH_BYTES:
                raise redis.InvalidResponse("a reply line is too long")
            return None
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line

    def _begin(self, size: int) -> None:
        """Begin a value with the bytes received so far; the rest of it comes next."""
        value = self._value = np.empty(size, np.uint8).data
        have = min(size, self._end - self._start)
        value[:have] = self._view[self._start : self._start + have]
        self._start += have
        self._into = value[have:] if have < size else None

    def _ended(self) -> memoryview | None:
        """The value that was begun, if any. This parser does not keep it in memory from then on."""
        value, self._value = self._value, None
        return value

    def _skip(self, count: int) -> int:
        """Skip `count` bytes; return how many of these are lacking."""
        step = min(count, self._end - self._start)
        self._start += step
        if self._start == self._end:
            self._start = self._end = 0
        return count - step


def _blocks(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys in portions, each for one MGET."""
    block: list[str] = []
    left = _BYTES
    for key, size in sizes.items():
        left -= size
        if block and (left < 0 or len(block) == _KEYS):
            yield block
            block, left = [], _BYTES - size
        block.append(key)
    if block:
        yield block
