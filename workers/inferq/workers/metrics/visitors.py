"""Connections to a small HTTP server: only so many, and always room for a new one.

Who connects and says nothing makes room for who comes after: first within one address, so that it
takes nothing from the others. Nobody has more than a few seconds, a short request and one answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from typing import Final

#: Connections at a time, and those of one address.
MAX_CONNECTIONS: Final = 32
MAX_PER_ADDRESS: Final = 8
_END: Final = b"\r\n\r\n"
#: Of an IPv6 address: whoever has one has all that share this prefix.
_PREFIX: Final = 64


class Visitors:
    """All connections that there are, in the order in which they came. For one event loop."""

    def __init__(self, answer: Callable[[bytes | None], bytes], most: int, within_s: float) -> None:
        """`answer` is asked with a request's head, or with None: it is longer than `most` bytes.

        A connection may take `within_s` from its beginning to its end.
        """
        self.answer = answer
        self.most = most
        self.within_s = within_s
        self._here: dict[_Visitor, None] = {}

    def visitor(self) -> asyncio.Protocol:
        """What serves the next connection."""
        return _Visitor(self)

    def came(self, visitor: _Visitor) -> None:
        """Of one more, for which another one is dropped if need be."""
        held = Counter(each.address for each in self._here)
        if held[visitor.address] >= MAX_PER_ADDRESS:
            self._drop_one_of({visitor.address})
        elif len(self._here) >= MAX_CONNECTIONS:
            most = max(held.values())
            self._drop_one_of({address for address, count in held.items() if count == most})
        self._here[visitor] = None

    def left(self, visitor: _Visitor) -> None:
        self._here.pop(visitor, None)

    def drop_all(self) -> None:
        for visitor in list(self._here):
            visitor.drop()

    def _drop_one_of(self, addresses: set[str]) -> None:
        """The oldest that has not asked yet; if all have, the oldest."""
        found = [each for each in self._here if each.address in addresses]
        next((each for each in found if not each.has_asked), found[0]).drop()


class _Visitor(asyncio.Protocol):
    """One connection."""

    def __init__(self, visitors: Visitors) -> None:
        self._visitors = visitors
        self._request = bytearray()
        self.has_asked = False
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.address = _whose(transport.get_extra_info("peername"))
        self._visitors.came(self)
        loop = asyncio.get_running_loop()
        self._end = loop.call_later(self._visitors.within_s, self.drop)

    def data_received(self, data: bytes) -> None:
        if self.has_asked:
            return
        self._request += data
        most, head = self._visitors.most, self._request.find(_END)
        if head < 0 and len(self._request) <= most:
            return
        self.has_asked = True
        self._transport.pause_reading()
        asked = bytes(self._request[:head]) if 0 <= head <= most else None
        self._request.clear()
        self._transport.write(self._visitors.answer(asked))
        self._transport.close()  # once it has been sent

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        self._visitors.left(self)

    def drop(self) -> None:
        """Close it at once, whatever it is about."""
        self._visitors.left(self)
        self._transport.abort()


def _whose(peer: object) -> str:
    """What tells whom a connection is from, of the name that its socket has for the peer."""
    host = peer[0] if isinstance(peer, tuple) else ""
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return str(host)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _PREFIX), strict=False))
    return str(address)
