"""Limits the connections to a small HTTP server, with always room for a new one.

A connection that has sent no request makes room for a newer one: first one from the same address,
so that no address displaces others. No connection has more than a few seconds, a short request and
one answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from typing import Final

#: Most connections at a time, in all and from one address.
MAX_CONNECTIONS: Final = 32
MAX_PER_ADDRESS: Final = 8
_END: Final = b"\r\n\r\n"
#: Bits of an IPv6 address that count: who has one address has all with this prefix.
_PREFIX: Final = 64


class Visitors:
    """All open connections, in the order in which they came. For one event loop."""

    def __init__(self, answer: Callable[[bytes | None], bytes], most: int, within_s: float) -> None:
        """`answer` gets a request's head, or None if that is longer than `most` bytes.

        A connection is closed `within_s` seconds after it began.
        """
        self.answer = answer
        self.most = most
        self.within_s = within_s
        self._here: dict[_Visitor, None] = {}

    def visitor(self) -> asyncio.Protocol:
        """The protocol object of the next connection."""
        return _Visitor(self)

    def came(self, visitor: _Visitor) -> None:
        """Add a connection, and drop another one if there are too many."""
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
        """Drop the oldest that has sent no request yet; if all have, the oldest."""
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
        self._transport.close()  # closes after it has been sent

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        self._visitors.left(self)

    def drop(self) -> None:
        """Close it at once."""
        self._visitors.left(self)
        self._transport.abort()


def _whose(peer: object) -> str:
    """Whom a connection counts for: its peer's address, or the prefix of an IPv6 one."""
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
