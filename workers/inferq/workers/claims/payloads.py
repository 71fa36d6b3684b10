"""Fetches claim-checked tensors: MGET on a connection of its own, straight into place.

A general reader copies each reply twice before it is a Python object; for tensors of hundreds of
kilobytes that is a good part of what a request costs. Here the kernel writes into the array itself.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import redis

from inferq.shared.resp import open_socket, pack, receive, send_all

_SCRATCH_BYTES: Final = 4096
#: Most keys asked for at once.
_KEYS: Final = 64
#: And bytes, as far as more than one key is asked for: Redis puts the reply together in its memory.
_BYTES: Final = 32 * 1024 * 1024
#: A payload may be so much larger than its message says, to be told by its size what is wrong.
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
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        self._start = self._end = 0

    def fetch(self, sizes: Mapping[str, int], limit: int) -> dict[str, bytes | memoryview | None]:
        """The bytes under the keys of `sizes`, which says how many are expected.

        None: the key is gone, or holds more than `limit` bytes, or many more than expected.
        """
        found: dict[str, bytes | memoryview | None] = {}
        try:
            if self._sock is None:
                self._sock = open_socket(self._client, self._timeout)
            for keys in _blocks(sizes):
                most = {key: min(limit, sizes[key] + _SLACK) for key in keys}
                found.update(self._fetch(self._sock, most))
        except BaseException:
            self.close()
            raise
        return found

    def close(self) -> None:
        """Close the connection, if there is one; never raises."""
        sock, self._sock = self._sock, None
        self._start = self._end = 0
        if sock is not None:
            sock.close()

    def _fetch(
        self, sock: socket.socket, most: Mapping[str, int]
    ) -> dict[str, bytes | memoryview | None]:
        send_all(sock, pack([("MGET", *most)]).pieces)
        head = self._line(sock)
        if head != b"*%d" % len(most):
            raise redis.ResponseError(f"MGET of {len(most)} payloads answered {head[:200]!r}")
        return {key: self._value(sock, limit) for key, limit in most.items()}

    def _value(self, sock: socket.socket, limit: int) -> memoryview | None:
        head = self._line(sock)
        if head in (b"_", b"$-1"):
            return None
        if head[:1] != b"$":
            raise redis.ResponseError(f"a payload was answered with {head[:200]!r}")
        size = int(head[1:])
        if size > limit:
            self._skip(sock, size)
            value = None
        else:
            value = np.empty(size, np.uint8).data
            self._read(sock, value)
        self._skip(sock, 2)
        return value

    def _line(self, sock: socket.socket) -> bytes:
        while (at := self._scratch.find(b"\r\n", self._start, self._end)) < 0:
            if self._start:
                rest = self._scratch[self._start : self._end]
                self._scratch[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            if self._end == _SCRATCH_BYTES:
                raise redis.InvalidResponse("a reply line is too long")
            self._end += receive(sock, self._view[self._end :])
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line

    def _read(self, sock: socket.socket, into: memoryview) -> None:
        have = min(len(into), self._end - self._start)
        into[:have] = self._view[self._start : self._start + have]
        self._start += have
        while have < len(into):
            have += receive(sock, into[have:], whole=True)

    def _skip(self, sock: socket.socket, count: int) -> None:
        while count:
            if self._start == self._end:
                self._start, self._end = 0, receive(sock, self._view)
            step = min(count, self._end - self._start)
            self._start += step
            count -= step


def _blocks(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys that are asked for at once."""
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
