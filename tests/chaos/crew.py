"""The real worker processes of a run, each with a thread that does its faults to it.

A worker that ended is started again, whoever ended it. What a victim held is read straight from
Redis the moment it was hit: those requests are the ones whose recovery is timed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from chaos.clock import Clock
from chaos.record import POISONED, Hit, Record
from chaos.schedule import Fault, Kind
from chaos.store import Store
from inferq.shared.codec import MalformedMessage, decode_envelope
from inferq.shared.names import Names, queue_of
from inferq.workers.engines.fake import EXIT_STATUS
from inferq.workers.process.children import start_child

HOOKS = Path(__file__).parent / "hooks"
#: Seconds.
POLL_S = 0.02
STOP_S = 50.0
READ_S = 15.0
#: Longer than any run, so that what is gone at its end was lost.
RESULT_EXPIRES_S = "7200"
_RECOVERED = re.compile(r"recovered (\d+) requests")


def held_by(store: redis.Redis, prefix: str) -> frozenset[str]:
    """The ids of all requests that incarnations beginning with `prefix` hold."""
    names = Names()
    leases: Any = store.zrange(names.leases, 0, -1)
    ids: set[str] = set()
    for incarnation in leases:
        if not incarnation.startswith(prefix.encode()):
            continue
        claims: Any = store.hkeys(names.claims(incarnation.decode()))
        for claim in claims:
            messages: Any = store.lrange(claim, 0, -1)
            for message in messages:
                with suppress(MalformedMessage):
                    ids.add(decode_envelope(message).headers.id)
    return frozenset(ids)


class Worker(threading.Thread):
    """One place of the crew. `url` is Redis as it sees it; `faults` are its own, by time."""

    def __init__(
        self,
        name: str,
        url: str,
        folder: Path,
        store: Store,
        faults: list[Fault],
        clock: Clock,
        record: Record,
    ) -> None:
        super().__init__(name=f"chaos-{name}", daemon=True)
        self.place = name
        self._url = url
        self._folder = folder
        self._store = store
        self._faults = list(faults)
        self._clock = clock
        self._record = record
        self._starts = 0
        self._prefix = ""
        self._log = folder / f"{name}.log"
        self._log_at = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        #: starting, up, stopped, down
        self.state = "down"

    @property
    def pending(self) -> int:
        """How many of its faults are still to come."""
        return len(self._faults)

    def end(self) -> None:
        """End the process with SIGTERM and wait for it. Once its faults are done."""
        self._over.set()
        self.join(STOP_S + 10)

    @property
    def prefix(self) -> str:
        """What the incarnations of the process that runs now begin with."""
        return self._prefix

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def recovered(self) -> int:
        """Requests that this worker has given back to their queues for others."""
        return sum(int(count) for count in _RECOVERED.findall(self.log()))

    def run(self) -> None:
        try:
            self._start()
            while not self._over.wait(POLL_S):
                if self._poll() is not None:
                    self._died()
                elif self.state == "starting":
                    if self._is_due():
                        self._clock.hold(self.place)
                    self._look_up()
                elif self._is_due():
                    self._clock.release(self.place)
                    fault = self._faults[0]
                    self._do(fault)
                    self._record.done.append((time.monotonic(), fault))
                    del self._faults[0]
            self._terminate()
        except Exception as problem:  # noqa: BLE001  the run must hear of it
            self._record.troubles.append(f"{self.place}: {problem!r}")
        finally:
            self._clock.release(self.place)
            self._kill()

    def _is_due(self) -> bool:
        return bool(self._faults) and self._clock.elapsed() >= self._faults[0].at_s

    def _poll(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def _start(self) -> None:
        self._starts += 1
        self._prefix = f"{self.place}n{self._starts}x"
        env = {
            **os.environ,
            "PYTHONPATH": str(HOOKS),
            "CHAOS_RUNS": str(self._folder),
            "INFERQ_REDIS_URL": self._url,
            "INFERQ_MODELS": str(self._folder / "models"),
            "INFERQ_INCARNATION": self._prefix,
            "INFERQ_RESULT_EXPIRES_S": RESULT_EXPIRES_S,
        }
        models = sorted(path.name for path in (self._folder / "models").iterdir())
        command = [
            sys.executable, "-m", "celery", "-A", "inferq.workers.app", "worker", "-P", "solo",
            "-Q", ",".join(queue_of(model) for model in models), "-n", f"{self.place}@%h",
            "--loglevel", "INFO", "--without-gossip", "--without-mingle",
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._log_at = log.tell()
            self._process = start_child(command, log, env=env)
        self.state = "starting"

    def _look_up(self) -> None:
        with self._log.open("rb") as log:
            log.seek(self._log_at)
            if b"serving " in log.read():
                self._up()

    def _died(self) -> None:
        """It ended although we did not end it: a request may do that, nothing else may."""
        process = self._process
        status = process.returncode if process is not None else None
        if status != EXIT_STATUS:
            self._record.troubles.append(f"{self.place} ended with status {status} by itself")
        self.state = "down"
        self._hit(POISONED)
        self._start()

    def _hit(self, what: str) -> None:
        at = time.monotonic()
        ids: frozenset[str] = frozenset()
        while time.monotonic() < at + READ_S:
            try:
                with self._store.client() as client:
                    ids = held_by(client, self._prefix)
                break
            except (redis.RedisError, RuntimeError):  # it is down just now
                time.sleep(POLL_S)
        self._record.hits.append(Hit(at, what, self.place, ids))
        self._record.away.append((at, self.place))

    def _do(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.SIGKILL:
                self._kill()
                self._hit(fault.kind)
                self._over.wait(fault.length_s)
                self._start()
            case Kind.SIGSTOP:
                self._signal(signal.SIGSTOP)
                self.state = "stopped"
                at = time.monotonic()
                self._hit(fault.kind)
                self._over.wait(max(0.0, at + fault.length_s - time.monotonic()))
                if fault.for_good:
                    self._kill()
                    self._hit(Kind.SIGKILL)
                    self._start()
                else:
                    self._signal(signal.SIGCONT)
                    self._up()
            case Kind.SIGTERM:
                self._terminate()
                self._over.wait(fault.length_s)
                self._start()
            case _:
                raise ValueError(f"{fault.kind} is nothing that is done to a worker")

    def _up(self) -> None:
        self.state = "up"
        self._record.up.append((time.monotonic(), self.place))

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S)
        self.state = "down"

    def _terminate(self) -> None:
        process = self._process
        if process is None:
            return
        self._record.away.append((time.monotonic(), self.place))
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._record.troubles.append(f"{self.place} runs on {STOP_S:g} s after SIGTERM")
            self._kill()
        self.state = "down"
