"""The worker's handle on a process of user code: starts it, asks it, ends it.

It ends with the worker, however that ends: the kernel kills it when the thread that started it is
gone, so all are started by one thread, which lasts as long as the worker does.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

import msgspec

from inferq.workers.process.children import start_child
from inferq.workers.user_code.log_lines import Reader
from inferq.workers.user_code.memory import Shared, new_file
from inferq.workers.user_code.messages import Asked, Channel, Gone, Told

CHILD: Final = "inferq.workers.user_code.child"
#: A process that was sent SIGKILL is gone within this, but for one in the depths of a driver.
GONE_S: Final = 10.0
#: How often the end of a process is looked for where the kernel does not tell it.
_LOOK_S: Final = 0.5
#: What a process has written when it ends is in the log before its end is.
_LOGGED_S: Final = 1.0


class ProcessEnded(Exception):
    """It is gone; `how` says how it ended, as in ``was killed by SIGSEGV``."""

    def __init__(self, how: str, *, timed_out: bool = False, killed: bool = False) -> None:
        super().__init__(how)
        self.how = how
        self.timed_out = timed_out
        #: By SIGKILL, and not by us.
        self.killed = killed


class CodeProcess:
    """One process, and the memory that it shares. For one thread at a time.

    `most`: bytes of the tensors of one batch, either way. `lane` is told in the log.
    """

    def __init__(
        self, model: str, lane: int | None, most: int, environment: Mapping[str, str]
    ) -> None:
        self._model, self._lane, self._most = model, lane, most
        self._environment = environment
        #: What its lines of logging begin with.
        self.mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it; OSError. Then `ask`, or `send` and `receive`, in turn."""
        ours, theirs = socket.socketpair()
        given, answered = new_file("inferq-in"), new_file("inferq-out")
        read, write = os.pipe()
        try:
            label = self._model if self._lane is None else f"{self._model}:{self._lane}"
            inherited = (theirs.fileno(), given, answered)
            command = [sys.executable, "-m", CHILD, label, *map(str, inherited)]
            self._process = _started(
                lambda: start_child(
                    command,
                    write,
                    env={**os.environ, **self._environment, "PYTHONUNBUFFERED": "1"},
                    pass_fds=inherited,
                )
            )
        except BaseException:
            for file in (given, answered, read):
                os.close(file)
            ours.close()
            raise
        finally:
            os.close(write)
            theirs.close()
        self._channel: Channel[Told] = Channel(ours, Told)
        #: Where a batch is written, and where its answer stands.
        self.given, self.answered = Shared(given, self._most), Shared(answered, self._most)
        self._log = Reader(read, self.mark, self._model, self._lane)
        self._log.start()
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._exit = _exit_descriptor(self._process.pid)
        if self._exit is not None:
            self._poll.register(self._exit, select.POLLIN)

    def ask(self, message: Asked, timeout: float) -> Told:
        """What it answers within `timeout` seconds. ProcessEnded: it has ended, or was ended."""
        self.send(message, timeout)
        return self.receive(timeout)

    def send(self, message: Asked, timeout: float) -> None:
        """ProcessEnded."""
        self._channel.connection.settimeout(timeout)
        try:
            self._channel.send(message)
        except OSError as problem:
            raise self.ended() from problem

    def receive(self, timeout: float) -> Told:
        """What it answers within `timeout` seconds. ProcessEnded: it has ended, or was ended."""
        until = time.monotonic() + timeout
        while not self._readable(until - time.monotonic()):
            if self.has_ended():
                raise self.ended()
            if time.monotonic() >= until:
                self.end()
                raise ProcessEnded(f"was ended after {timeout:g} s", timed_out=True)
        self._channel.connection.settimeout(max(0.001, until - time.monotonic()))
        try:
            return self._channel.receive()
        except (Gone, OSError, msgspec.DecodeError) as problem:
            raise self.ended() from problem

    def _readable(self, timeout: float) -> bool:
        if self._exit is None:
            timeout = min(timeout, _LOOK_S)
        ready = self._poll.poll(max(0.0, timeout) * 1000)
        # What it said before it ended is heard.
        return any(file == self._channel.connection.fileno() for file, _ in ready)

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def ended(self) -> ProcessEnded:
        """It has ended, or its socket has: how. What is there of it still is ended."""
        process = self._process
        if process is None:
            return ProcessEnded("is closed")
        try:
            status = process.wait(_LOGGED_S)
        except subprocess.TimeoutExpired:  # it has closed the socket and goes on
            self.end()
            return ProcessEnded("closed its socket")
        self.end()
        return ProcessEnded(_how(status), killed=status == -signal.SIGKILL)

    def end(self) -> None:
        """SIGKILL, also to what it has started, and free all. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the leader of a session of its own
        with suppress(subprocess.TimeoutExpired):
            process.wait(GONE_S)
        self._channel.connection.close()
        if self._exit is not None:
            os.close(self._exit)
        self.given.close()
        self.answered.close()
        self._log.join(_LOGGED_S)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = ", as the kernel does where memory runs out" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{why}"


def _exit_descriptor(pid: int) -> int | None:
    """What becomes readable as the process ends; None on an old kernel.

    The socket alone does not tell: what the process has forked may hold its other end open.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


# --- the thread that starts them -----------------------------------------------------------------

_Start = Callable[[], "subprocess.Popen[bytes]"]
_orders: Final[SimpleQueue[tuple[_Start, Future[subprocess.Popen[bytes]]]]] = SimpleQueue()
_starting: Final = threading.Lock()
_thread: threading.Thread | None = None


def _started(start: _Start) -> subprocess.Popen[bytes]:
    global _thread  # noqa: PLW0603 - one for all models of the process
    with _starting:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_starts, name="inferq-starts-code", daemon=True)
            _thread.start()
    done: Future[subprocess.Popen[bytes]] = Future()
    _orders.put((start, done))
    return done.result()


def _starts() -> None:
    while True:
        start, done = _orders.get()
        try:
            done.set_result(start())
        except BaseException as problem:  # noqa: BLE001 - raised where it was ordered
            done.set_exception(problem)
