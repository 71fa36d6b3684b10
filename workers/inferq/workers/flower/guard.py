"""Keeps websites that an operator visits from reading Flower through the operator's browser.

A Flower on loopback asks for no password, since users of this machine may see it. So may their
browsers, in which any website runs. A website can make its name resolve to 127.0.0.1; the browser
then takes Flower for that website and lets it read Flower, but names the website as Host. If a
website sends requests directly, the browser names it as Origin. Both must be names of this machine.

No page of Flower may be shown within another page, where clicks can be stolen.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final
from urllib.parse import urlsplit

from flower import command
from flower.app import Flower
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import OutputTransform, RequestHandler

from inferq.workers.flower import access
from inferq.workers.logs.printing import plain

_HEADERS: Final = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",  # the same to old browsers
}
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@,/\s]+)(?::[0-9]+)?")
#: Characters of a refused header that the answer repeats.
_MOST: Final = 100


def install(hosts: Collection[str] | None) -> bool:
    """Make the Flower that is about to start in this process refuse requests of strangers.

    `hosts`: names of this Flower besides this machine's own; None: any name. Returns False if this
    Flower is not built like the tested one; then nothing was changed.
    """
    if getattr(command, "Flower", None) is not Flower:
        return False
    command.Flower = lambda **options: _Guarded(hosts, **options)
    return True


def stranger(request: HTTPServerRequest, hosts: Collection[str]) -> str | None:
    """The Host or Origin of a request, if it is no name of this Flower; else None."""
    host = request.headers.get("Host")
    if host is not None and not _is_ours(host, hosts):  # a browser always sends one
        return f"Host {_short(host)}"
    origin = request.headers.get("Origin")
    if origin is not None and not _is_ours(_netloc(origin), hosts):
        return f"Origin {_short(origin)}"
    return None


def _is_ours(host: str, hosts: Collection[str]) -> bool:
    """Whether `host`, perhaps with a port, is loopback, or one of `hosts`."""
    found = _HOST.fullmatch(host.lower())
    if found is None:
        return False
    name = found[1]
    return name in hosts or access.is_loopback(name)


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _short(text: str) -> str:
    return plain(text if len(text) <= _MOST else f"{text[:_MOST]}…")


class _Guarded(Flower):  # type: ignore[misc]
    """Stock Flower, behind the guard."""

    def __init__(self, hosts: Collection[str] | None, **options: Any) -> None:
        super().__init__(**options)
        self._hosts = hosts
        self.add_transform(_InNoFrame)

    def find_handler(self, request: HTTPServerRequest, **options: Any) -> Any:
        who = None if self._hosts is None else stranger(request, self._hosts)
        if who is None:
            return super().find_handler(request, **options)
        return self.get_handler_delegate(request, _Refused, {"who": who})


class _Refused(RequestHandler):
    """Refuses, and says how an operator can permit the request."""

    def initialize(self, who: str) -> None:
        self._who = who

    def check_xsrf_cookie(self) -> None:
        """Nothing needs this check here."""

    def prepare(self) -> None:
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.finish(
            f"{self._who}; expected localhost, 127.0.0.1 or [::1]: this Flower is for its own "
            "machine. For another name, start inferq flower with --allow-host NAME "
            f"({access.HOSTS_VARIABLE}), or with --basic-auth.\n"
        )


class _InNoFrame(OutputTransform):
    def __init__(self, request: HTTPServerRequest) -> None:
        pass

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        for name, value in _HEADERS.items():
            headers[name] = value
        return status_code, headers, chunk
