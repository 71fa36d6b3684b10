"""A real Flower process, waited for and never left behind."""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from helpers.scoped import Scoped
from helpers.wait import until
from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import free_port

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
REPLY_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Reply:
    """What Flower answered."""

    status: int
    body: str
    #: By names in lower case.
    headers: Mapping[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


class FlowerProcess(Scoped):
    """``inferq flower`` on a free port of `address`, or with `celery` Celery's own command.

    `args` are further options, `env` adds environment variables, `folders` stand first in the
    import path. `prefix`, such as "/ops", stands before each of its paths. Its API answers without
    a password where none is set.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        address: str = "127.0.0.1",
        celery: Sequence[str] | None = None,
        args: Sequence[str] = (),
        prefix: str = "",
        env: Mapping[str, str] | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        self.port = free_port()
        self._prefix = prefix
        args = [*args, *([f"--url-prefix={prefix.strip('/')}"] if prefix else [])]
        self._log_folder = tempfile.TemporaryDirectory(prefix="inferq-flower-")
        self._log = Path(self._log_folder.name) / "log"
        if celery is None:
            command = ["inferq.workers.cli", "flower", "--address", address]
            options = ["--port", str(self.port)]
        else:
            command = ["celery", "-A", "inferq.workers.app", "flower", *celery]
            options = [f"--port={self.port}"]
        self._command = [sys.executable, "-m", *command, *options, *args]
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, sys.path)]),
            "INFERQ_REDIS_URL": redis_url,
            "FLOWER_UNAUTHENTICATED_API": "true",
            **(env or {}),
        }

    def _begin(self) -> None:
        with self._log.open("wb") as log:
            self.process = start_child(
                self._command, log, env=self._env, cwd=Path(self._log_folder.name)
            )
        until(self._answers, START_TIMEOUT_S, "Flower answers")

    def _explain(self) -> None:
        sys.stderr.write(f"--- log of Flower ---\n{self.log[-4000:]}\n")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self._prefix}"

    @property
    def log(self) -> str:
        """All it has written to stdout and stderr."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def get(self, path: str, credentials: str | None = None) -> Reply:
        """The answer to GET; `credentials` is user:password."""
        request = urllib.request.Request(f"{self.url}{path}")
        if credentials is not None:
            token = base64.b64encode(credentials.encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=REPLY_TIMEOUT_S) as reply:
                return Reply(reply.status, reply.read().decode(), _lower(reply.headers))
        except urllib.error.HTTPError as problem:
            with problem:
                return Reply(problem.code, problem.read().decode(), _lower(problem.headers))

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"Flower ended with {self.process.returncode}")
        try:
            return self.get("/healthcheck").status == 200
        except OSError:
            return False

    def _end(self) -> None:
        end_child(self.process, STOP_TIMEOUT_S)
        self._log_folder.cleanup()


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
