"""Runs the demo's Flower, if it is installed: starts it, waits for it, and stops it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import HOST, free_port

NOT_INSTALLED: Final = "not installed; pip install 'inferq[flower]' shows all this in a browser"
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
_ANSWER_S: Final = 2.0
_POLL_S: Final = 0.05
_LOG_TAIL_BYTES: Final = 4_000
#: It uses no proxy of the environment.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class FlowerProcess:
    """``inferq flower`` on a free loopback port; see `running_flower`."""

    def __init__(self, redis_url: str) -> None:
        self.address = f"http://{HOST}:{free_port()}"
        self._env = {**os.environ, "INFERQ_REDIS_URL": redis_url}
        self._log = tempfile.NamedTemporaryFile(prefix="inferq-flower-", suffix=".log")  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        host, port = self.address.removeprefix("http://").split(":")
        command = [
            sys.executable, "-m", "inferq.workers.cli", "flower",
            "--address", host, "--port", port,
        ]  # fmt: skip
        self._process = start_child(command, self._log.file, env=self._env)

    def stop(self) -> None:
        """Idempotent."""
        if self._process is not None:
            end_child(self._process, STOP_TIMEOUT_S)
        self._log.close()

    def await_answer(self) -> str | None:
        """Wait until it answers: None. If it ends or takes too long: the end of its output."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process is not None and self._process.poll() is None:
            if self._answers():
                return None
            if time.monotonic() > deadline:
                return f"no answer within {START_TIMEOUT_S:g} s"
            time.sleep(_POLL_S)
        log = Path(self._log.name).read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return next(reversed(log.split("\n")[:-1]), "it ended")

    def _answers(self) -> bool:
        try:
            with _OPENER.open(f"{self.address}/healthcheck", timeout=_ANSWER_S):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


@contextmanager
def running_flower(redis_url: str) -> Iterator[FlowerProcess | None]:
    """A Flower that is stopped in any case at the end; None if it is not installed."""
    if importlib.util.find_spec("flower") is None:
        yield None
        return
    flower = FlowerProcess(redis_url)
    try:
        flower.start()
        yield flower
    finally:
        flower.stop()
