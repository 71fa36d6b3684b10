"""Runs the demo's one worker process: starts it, waits for it, watches it, and stops it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import redis

from inferq.shared.errors import InferqError
from inferq.shared.names import Names
from inferq.workers.process.children import end_child, start_child

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 40.0
_POLL_S: Final = 0.05
_LOG_TAIL_BYTES: Final = 4_000


class WorkerFailed(InferqError):
    """The worker process ended, or did not start. The message ends with the end of its log."""

    code = "worker_failed"


class WorkerProcess:
    """``inferq worker`` on the repository `models`; see `running_worker`."""

    def __init__(self, models: Path, redis_url: str) -> None:
        self._command = [
            sys.executable,
            "-m",
            "inferq.workers.cli",
            "worker",
            "--models",
            str(models),
            "--name",
            f"demo{os.getpid()}@%h",
        ]
        self._env = {**os.environ, "INFERQ_REDIS_URL": redis_url}
        self._log = tempfile.NamedTemporaryFile(prefix="inferq-worker-", suffix=".log")  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = start_child(self._command, self._log.file, env=self._env)

    def stop(self) -> None:
        """Send SIGTERM; the worker finishes or hands back what it holds. Idempotent."""
        if self._process is not None:
            end_child(self._process, STOP_TIMEOUT_S)
        self._log.close()

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def await_models(self, client: redis.Redis, names: Names, models: Iterable[str]) -> None:
        """Return once all of `models` are served. Raises WorkerFailed."""
        deadline = time.monotonic() + START_TIMEOUT_S
        missing = set(models)
        while missing:
            if self.ended:
                raise self.failure("the worker ended")
            if time.monotonic() > deadline:
                waited = f"{START_TIMEOUT_S:g} s"
                raise self.failure(f"{', '.join(sorted(missing))} not served within {waited}")
            seconds, micros = client.time()
            now_ms = seconds * 1000 + micros // 1000
            missing = {m for m in missing if not client.zcount(names.serving(m), now_ms, "+inf")}
            time.sleep(_POLL_S)

    def failure(self, what: str) -> WorkerFailed:
        """`what`, and the end of the worker's log."""
        log = Path(self._log.name).read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return WorkerFailed(f"{what}; the end of its log:\n{log.rstrip()}")


@contextmanager
def running_worker(models: Path, redis_url: str) -> Iterator[WorkerProcess]:
    """A worker process that is stopped in any case at the end."""
    worker = WorkerProcess(models, redis_url)
    try:
        worker.start()
        yield worker
    finally:
        worker.stop()


@contextmanager
def watched(worker: WorkerProcess, on_end: Callable[[], None]) -> Iterator[None]:
    """Meanwhile call `on_end`, once and from another thread, if the worker ends."""
    leaving = threading.Event()

    def watch() -> None:
        while not leaving.wait(_POLL_S):
            if worker.ended:
                on_end()
                return

    thread = threading.Thread(target=watch, name="inferq-demo-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join()
