"""A proxy that counts the data plane's Redis commands, and stops at any one of them.

The data plane's connection is known by its CLIENT TRACKING; the others pass untouched. Once armed,
the first MULTI on it is command 0; the first `k` commands are forwarded, nothing after them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

import hiredis

_NOTHING = object()


class CommandProxy:
    """Listens on a loopback port and forwards to Redis at `target`.

    `on_limit` is called once, from a proxy thread, when a command would pass the limit; by then
    nothing more of that connection is forwarded, in either direction.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._limit: int | None = None
        self._lost_trip: int | None = None
        self._on_limit: Callable[[], None] = lambda: None
        #: Commands of the armed path seen so far, by name.
        self.seen: list[str] = []
        self.limited = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def arm(
        self,
        limit: int,
        on_limit: Callable[[], None] = lambda: None,
        *,
        lost_trip: int | None = None,
    ) -> None:
        """Forward the next `limit` commands, counted from the next MULTI, and no more.

        From the MULTI number `lost_trip` on (0 is the first), no reply reaches the worker.
        """
        with self._lock:
            self.seen = []
            self.limited.clear()
            self._on_limit = on_limit
            self._lost_trip = lost_trip
            self._limit = limit

    def disarm(self) -> None:
        with self._lock:
            self._limit = None
            self._lost_trip = None

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing = True
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                client.close()
                continue
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.settimeout(None)
            with self._lock:
                self._sockets |= {client, server}
            _Connection(self, client, server).start()

    def _admits(self, command: list[bytes]) -> bool:
        """Whether this command of a data-plane connection may pass; counts it."""
        with self._lock:
            if self._limit is None or (not self.seen and command[0] != b"MULTI"):
                return True
            if len(self.seen) < self._limit:
                self.seen.append(command[0].decode())
                return True
            if self.limited.is_set():
                return False
            self.limited.set()
        self._on_limit()
        return False

    def _replies_pass(self) -> bool:
        with self._lock:
            return self._lost_trip is None or self.seen.count("MULTI") <= self._lost_trip


class _Connection:
    def __init__(self, proxy: CommandProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._data_plane = False
        self._held = False

    def start(self) -> None:
        threading.Thread(target=self._upward, daemon=True).start()
        threading.Thread(target=self._downward, daemon=True).start()

    def _upward(self) -> None:
        reader = hiredis.Reader(notEnoughData=_NOTHING)
        try:
            while chunk := self._client.recv(1 << 16):
                if not self._data_plane and b"TRACKING" not in chunk:
                    self._server.sendall(chunk)
                    continue
                self._data_plane = True
                reader.feed(chunk)
                while not self._held and (command := reader.gets()) is not _NOTHING:
                    if self._proxy._admits(command):
                        self._server.sendall(hiredis.pack_command(tuple(command)))
                    else:
                        self._held = True
        except OSError:
            pass
        self._end()

    def _downward(self) -> None:
        try:
            while chunk := self._server.recv(1 << 16):
                if self._data_plane and not self._proxy._replies_pass():
                    continue
                self._client.sendall(chunk)
        except OSError:
            pass
        self._end()

    def _end(self) -> None:
        for sock in (self._client, self._server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
