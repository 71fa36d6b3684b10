"""A worker's small HTTP server for Prometheus: ``/metrics`` and ``/healthz``.

It runs in a thread with an event loop of its own. No scraper can disturb the request path: each
connection has a few seconds, a short request and one answer, and there are few at a time
(`visitors`), always including the newest.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from inferq.shared.errors import ConfigError
from inferq.shared.settings import split_address
from inferq.workers.metrics.visitors import Visitors
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

#: Seconds that a connection may take, from its beginning to its end.
ANSWER_WITHIN_S: Final = 5.0
#: Bytes that a request may have.
MAX_REQUEST_BYTES: Final = 8 * 1024
#: Connections that the kernel queues until they are accepted.
_BACKLOG: Final = 128
#: Errors after which none can be accepted for the moment, and seconds until the next attempt.
_NOTHING_LEFT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_S: Final = 0.5
#: Errors of the listening socket itself.
_BROKEN: Final = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)
_REASONS: Final = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip
_TEXT: Final = "text/plain; charset=utf-8"
#: Status, content type and body.
Answer = tuple[int, str, bytes]


class Endpoint:
    """Serves `registry` at `address`. `problem` returns why the worker does not serve, or None.

    Its methods are called from one thread.
    """

    def __init__(
        self, address: str, registry: CollectorRegistry, problem: Callable[[], str | None]
    ) -> None:
        self._address = address
        self._registry = registry
        self._problem = problem
        self._socket: socket.socket | None = None
        #: Ends the current turn.
        self._end: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        self.loop = Periodic(
            "metrics",
            self._turn,
            every_s=0.0,
            stall_s=math.inf,
            failing="no metrics for the moment",
            logger=logger,
        )
        #: Its URL. Port 0 in the address means any free port.
        self.url = ""

    def start(self) -> None:
        """Begin to serve. ConfigError: the address cannot be used."""
        try:
            self._socket = _listen(self._address)
        except OSError as problem:
            raise ConfigError(
                f"INFERQ_METRICS is {self._address!r}; expected a HOST:PORT that is free here: "
                f"{problem.strerror or problem}"
            ) from None
        host, port = self._socket.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url = f"http://{self._address}/metrics"
        self.loop.start()
        logger.info("metrics at %s", self.url)

    def stop(self) -> None:
        """Idempotent."""
        self.loop.stop(0.0)  # else the next turn would begin
        with self._lock, suppress(RuntimeError):  # its loop has ended by now
            self._end()
        self.loop.stop()

    def _turn(self) -> None:
        listening, self._socket = self._socket or _listen(self._address), None
        try:
            with asyncio.Runner() as runner:
                runner.run(self._listen(listening))
        finally:
            listening.close()

    async def _listen(self, listening: socket.socket) -> None:
        loop, ending = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._end = lambda: loop.call_soon_threadsafe(ending.set)
        visitors = Visitors(self._answer, MAX_REQUEST_BYTES, ANSWER_WITHIN_S)
        receiving = asyncio.create_task(_receive(listening, visitors))
        until_end = asyncio.create_task(ending.wait())
        try:
            if not self.loop.stopping:
                await asyncio.wait((receiving, until_end), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()  # raises its error
        finally:
            receiving.cancel()
            until_end.cancel()
            visitors.drop_all()

    def _answer(self, asked: bytes | None) -> bytes:
        """The whole answer to a request with this head; None: the head was too long."""
        try:
            line, *headers = (asked or b"").decode("latin-1").split("\r\n")
            method, target, _ = line.split(" ", 2)
        except ValueError:
            method, (status, kind, body) = "", (400, _TEXT, b"expected GET /metrics HTTP/1.1\n")
        else:
            status, kind, body = self._page(method, target.partition("?")[0], headers)
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else body)

    def _page(self, method: str, path: str, headers: list[str]) -> Answer:
        if method not in {"GET", "HEAD"}:
            return 405, _TEXT, b"expected GET\n"
        if path == "/healthz":
            problem = self._problem()
            return (503, _TEXT, f"{problem}\n".encode()) if problem else (200, _TEXT, b"ok\n")
        if path != "/metrics":
            return 404, _TEXT, b"expected /metrics or /healthz\n"
        accepted = [
            value
            for name, _, value in (h.partition(":") for h in headers)
            if name.lower() == "accept"
        ]
        encode, kind = _format(",".join(accepted))
        try:
            return 200, kind, encode(self._registry)
        except Exception:
            logger.exception("no metrics this time")
            return 500, _TEXT, b"see the worker's log\n"


async def _receive(listening: socket.socket, visitors: Visitors) -> None:
    """Accept connections one by one; between two, other tasks run."""
    loop, short_of = asyncio.get_running_loop(), ""
    while True:
        try:
            peer, _ = await loop.sock_accept(listening)
        except OSError as problem:
            if problem.errno in _BROKEN:
                raise  # the next turn opens a new socket
            if problem.errno not in _NOTHING_LEFT:  # the client went away before
                await asyncio.sleep(0)
                continue
            if not short_of:
                short_of = str(problem)
                logger.warning("no connection to the metrics for the moment: %s", problem)
            await asyncio.sleep(_PAUSE_S)
            continue
        short_of = ""
        try:
            await loop.connect_accepted_socket(visitors.visitor, peer)
        except OSError:  # it went away
            peer.close()


def _format(accepted: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """How to write metrics, and the content type; the oldest format for an odd Accept header."""
    try:
        encode, kind = choose_encoder(accepted)
    except Exception:  # noqa: BLE001 - bad version numbers raise various errors
        return choose_encoder("")
    return (encode, kind) if kind.isprintable() else choose_encoder("")


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    family, kind, protocol, _, at = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # Connections of the worker before may be in TIME_WAIT.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(at)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
