"""What Flower answers, and to whose pages: websites that an operator visits get nothing of it.

A Flower on loopback asks for no password, since whoever is on this machine may see it. So may his
browser, in which any website runs. One whose name is made to resolve to 127.0.0.1 would have the
browser take Flower for that website, and read it; but then the browser names the website as Host.
One that sends requests as they are is named as their Origin. Both must be of this machine.

No page of Flower's is shown within another one, where clicks on it can be stolen.
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
#: Of a refused header, as much is repeated.
_MOST: Final = 100


def install(hosts: Collection[str] | None) -> bool:
    """Have the Flower that is about to be made in this process refuse the requests of strangers.

    `hosts`: names that it is asked for by, besides this machine's own; None: all will do. False:
    this Flower is not made as the tested one is, and nothing was done.
    """
    if getattr(command, "Flower", None) is not Flower:
        return False
    command.Flower = lambda **options: _Guarded(hosts, **options)
    return True


def stranger(request: HTTPServerRequest, hosts: Collection[str]) -> str | None:
    """What a request says of whom it was meant for or is from, if that is no name of ours."""
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
    """Says no, and how an operator has it say yes."""

    def initialize(self, who: str) -> None:
        self._who = who

    def check_xsrf_cookie(self) -> None:
        """There is nothing to guard."""

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
