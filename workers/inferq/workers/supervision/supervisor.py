"""Keeps the worker processes of one host alive: one child per device.

A child that dies is started again at once, more slowly if it keeps dying soon after its start, and
what it held goes back to the queues without waiting for its lease. A child that has work and would
never get on with it is killed first. Signals are passed on.
"""

from __future__ import annotations

import logging
import secrets
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import redis

from inferq.shared.names import Names
from inferq.workers.claims.recovery import Recoverer
from inferq.workers.process.children import start_child
from inferq.workers.process.periodic import Sayings
from inferq.workers.supervision import runtime_folder
from inferq.workers.supervision.health import (
    EX_FATAL_ENGINE,
    EX_SHUT_DOWN,
    LOADING,
    SERVING,
    Beat,
    read_beat,
    stuck,
)
from inferq.workers.warmup.limits import limits, oom_kills, was_killed
from inferq.workers.warmup.notes import absolve

logger = logging.getLogger(__name__)

#: Signals that stop the children, and what each is passed on as the first time.
STOPS: Final = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGQUIT,
}
#: Real-time signals have numbers only.
_NAMES: Final = {each.value: each.name for each in signal.Signals}
#: Seconds between looks at the children's heartbeats.
LOOK_S: Final = 0.25
#: Seconds without a heartbeat after which a child that has served is killed.
SILENT_S: Final = 60.0
#: Seconds for which a Redis that is away is asked again to put back what a dead child held.
RECOVER_S: Final = 30.0
#: A child that served for less than so many seconds died too soon.
SOON_S: Final = 10.0
#: Seconds before the second child in a row that died too soon is replaced; doubles from there.
BACK_OFF_S: Final = 1.0
MAX_BACK_OFF_S: Final = 30.0
#: How a process may end for want of memory: killed, or where it takes no notice of a refusal.
_MAY_BE_MEMORY: Final = (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)


@dataclass
class Child:
    """One worker process after the other, on one device. Times: monotonic s."""

    node: str
    command: Sequence[str]
    environment: Mapping[str, str]
    heartbeat: Path
    #: The folder of that, where nobody has named it: it may be among temporary files.
    folder: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    #: What the names of its incarnations begin with.
    prefix: str = ""
    started: float = 0.0
    #: How often the kernel had killed for want of memory by then (see `limits.oom_kills`).
    oom_kills: Mapping[str, int] = field(default_factory=dict)
    #: When it was first seen to serve; 0: not yet.
    served: float = 0.0
    #: Whether any of them has ever served.
    proven: bool = False
    #: Its last heartbeat, when that was first seen, and when it was last looked for.
    beat: float = 0.0
    beat_at: float = 0.0
    looked_at: float = 0.0
    #: How many in a row died too soon.
    failures: int = 0
    #: When the next one is to be started.
    due: float = 0.0
    #: Prefixes of dead ones whose claims are still to be recovered, and when that is given up.
    dead: dict[str, float] = field(default_factory=dict)
    #: Whether the last try to recover them failed.
    failed_recovery: bool = False


def _limit() -> str:
    """The tightest limit on memory."""
    found = min(limits(), key=lambda limit: limit.limit, default=None)
    return "no limit is known" if found is None else f"{found.limit >> 20} MiB of {found.name}"


def _of(child: Child) -> dict[str, str]:
    """`extra` for a log line about `child`."""
    return {"node": child.node}


class _Signals:
    """Handlers of the signals that concern a supervisor, while inside. Main thread only.

    Not by blocking them: other threads (numpy's own) would still take them, and die of it.
    """

    def __init__(self) -> None:
        #: Those that ask to stop, in order.
        self.came: deque[signal.Signals] = deque()

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {each: signal.signal(each, self._note) for each in (*STOPS, signal.SIGCHLD)}
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, _frame: object) -> None:
        if number in STOPS:
            self.came.append(signal.Signals(number))

    def wait(self, seconds: float) -> None:
        """Until one comes, or `seconds` have passed."""
        if not self.came and select.select([self._reader], [], [], seconds)[0]:
            self._reader.recv(4096)


class Supervisor:
    """`run` starts the children and returns the exit status once all have ended."""

    def __init__(
        self,
        children: Sequence[Child],
        client: redis.Redis,
        names: Names,
        *,
        allow_remote_shutdown: bool = False,
    ) -> None:
        self._children = list(children)
        self._allow_remote_shutdown = allow_remote_shutdown
        self._client = client
        self._names = names
        # Its thread is never started: the dead are known here.
        self._recoverer = Recoverer(client, names, lease_s=0.0)
        self._sayings = Sayings()
        self._status = 0
        self._stops = 0

    def run(self) -> int:
        """Only in the main thread: signals are waited for here."""
        with _Signals() as signals:
            try:
                while self._children:
                    if not signals.came:  # as one may have while a dead one's claims were put back
                        self._start_due()
                    signals.wait(LOOK_S)
                    while signals.came:
                        self._stop(signals.came.popleft())
                    for child in list(self._children):
                        self._look_at(child)
            finally:
                for child in self._children:
                    if child.process is not None:
                        child.process.kill()
        return self._status

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.process is None and not self._stops and now >= child.due:
                child.prefix = secrets.token_hex(4)
                child.started, child.served = now, 0.0
                child.beat_at, child.beat = now, 0.0
                child.oom_kills = oom_kills()
                environment = {**child.environment, "INFERQ_INCARNATION": child.prefix}
                try:
                    child.process = start_child(child.command, None, env=environment)
                except OSError as problem:  # no memory, no process slots
                    logger.error("%s cannot be started: %s", child.node, problem, extra=_of(child))
                    child.due = now + BACK_OFF_S

    def _stop(self, came: signal.Signals) -> None:
        """The first time as Celery takes it; the second time hand back all; then just end."""
        self._stops += 1
        passed = (STOPS[came], signal.SIGQUIT, signal.SIGKILL)[min(self._stops, 3) - 1]
        logger.info("%s: %s to the workers", came.name, passed.name)
        for child in list(self._children):
            if child.process is not None:
                child.process.send_signal(passed)

    def _look_at(self, child: Child) -> None:
        process = child.process
        if process is not None and process.poll() is not None:
            self._ended(child, process.pid, process.returncode)
        else:
            if process is not None:
                self._watch(child, process)
            if child.dead:
                self._recover(child)
        if child.process is None and self._stops and child in self._children:
            self._children.remove(child)
            child.heartbeat.unlink(missing_ok=True)

    def _watch(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        beat, now = self._beat_of(child), time.monotonic()
        if beat is None or beat.pid != process.pid:
            return
        if beat.written != child.beat or now - child.looked_at > SILENT_S / 4:
            child.beat, child.beat_at = beat.written, now
        child.looked_at = now
        if not child.served and beat.state == SERVING:
            child.served, child.proven = time.monotonic(), True
            logger.info(
                "%s serves, %.1f s after its start",
                child.node,
                child.served - child.started,
                extra=_of(child),
            )
        reason = stuck(beat)
        if beat.state != LOADING and now - child.beat_at > SILENT_S:
            reason = f"no heartbeat for {now - child.beat_at:.0f} s"
        if reason is not None:
            logger.critical("%s is killed: %s", child.node, reason, extra=_of(child))
            process.kill()

    def _beat_of(self, child: Child) -> Beat | None:
        """Its heartbeat; None where it has none, or where another user may have written it."""
        problem = runtime_folder.problem_of(child.folder) if child.folder else None
        if problem is None:
            return read_beat(child.heartbeat)
        child.beat_at = time.monotonic()  # its silence is not its own
        if self._sayings.due(child.node) is not None:
            logger.error("%s is not watched: %s", child.node, problem, extra=_of(child))
        return None

    def _ended(self, child: Child, pid: int, status: int) -> None:
        child.process = None
        child.dead[child.prefix] = time.monotonic() + RECOVER_S
        self._recover(child)
        how = f"by {_NAMES.get(-status, -status)}" if status < 0 else f"with status {status}"
        if status == -signal.SIGKILL and was_killed(child.oom_kills, oom_kills()):
            how += f", by the kernel for want of memory ({_limit()})"
        if self._stops or status not in _MAY_BE_MEMORY:
            absolve(pid)
        if self._stops and status == -signal.SIGTERM:  # it was only being imported
            status = 0
        if status == EX_SHUT_DOWN:
            how = "as it was told by remote control"
            if self._stops or self._allow_remote_shutdown:
                status = 0
            else:
                how += " (--allow-remote-shutdown would end it for good)"
        planned = status in (EX_FATAL_ENGINE, EX_SHUT_DOWN)
        hopeless = status > 0 and not planned and not child.proven
        if self._stops or status == 0 or hopeless:
            # As it was told to; or it cannot serve at all, which trying again does not change.
            level = logging.ERROR if status else logging.INFO
            logger.log(level, "%s ended %s", child.node, how, extra=_of(child))
            self._status = self._status or (status if status >= 0 else 128 - status)
            self._children.remove(child)
            child.heartbeat.unlink(missing_ok=True)
            return
        soon = not child.served or time.monotonic() - child.served < SOON_S
        child.failures = child.failures + 1 if soon else 0
        wait = 0.0
        if child.failures > 1:
            wait = min(MAX_BACK_OFF_S, BACK_OFF_S * 2 ** (child.failures - 2))
        child.due = time.monotonic() + wait
        logger.error(
            "%s ended %s; the next one starts in %g s", child.node, how, wait, extra=_of(child)
        )

    def _recover(self, child: Child) -> None:
        """Put back what its dead incarnations held. If Redis is away, the next look tries again."""
        for prefix, until in list(child.dead.items()):
            try:
                found = self._client.zscan_iter(self._names.leases, match=f"{prefix}*")
                for incarnation in [str(member, "utf-8", "replace") for member, _ in found]:
                    child.proven = True  # it lived, though it may not have been seen to
                    self._recoverer.recover(incarnation, dead=True)
            except Exception as problem:  # noqa: BLE001 - or the next child would not be started
                if not child.failed_recovery:
                    child.failed_recovery = True
                    logger.warning(
                        "what %s held is not put back yet: %s",
                        child.node,
                        problem,
                        extra=_of(child),
                    )
                if time.monotonic() < until:
                    return
                logger.warning(
                    "what %s held waits for its lease to end: %s",
                    child.node,
                    problem,
                    extra=_of(child),
                )
            child.failed_recovery = False
            del child.dead[prefix]
