"""Real worker processes, waited for and never left behind."""

from __future__ import annotations

import base64
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from helpers.process import stopped
from helpers.scoped import Scoped
from helpers.wait import until
from inferq.shared.names import Names, queue_of
from inferq.workers.process.children import end_child, start_child
from inferq.workers.supervision.health import SERVING, read_beat

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0
#: How often, and after how long each, a worker that was told to end is woken to see it.
WAKE_UPS, WAKE_UP_S = 20, 0.05
#: A broadcast of Celery's that is addressed to no worker at all.
FOR_NOBODY = json.dumps(
    {
        "body": base64.b64encode(b'{"method": "ping", "destination": ["nobody"]}').decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"clock": 1, "expires": 0},
        "properties": {
            "delivery_mode": 2,
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "none",
            "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
        },
    }
)


class Worker(Scoped):
    """``celery -A inferq.workers.app worker`` on the queues of `serve`, from the folder `models`.

    `serve` names models; None: every folder in `models`. `bad` names those of them that it is to
    serve and cannot: they are not waited for. `env` adds environment variables, `args`
    command-line options. As a context manager it starts, waits until its models are announced,
    and stops at the end. `models` may be None for an app that needs no repository.
    """

    def __init__(
        self,
        redis_url: str,
        models: Path | None,
        serve: Sequence[str] | None = None,
        *,
        bad: Sequence[str] = (),
        name: str = "test",
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        names: Names | None = None,
    ) -> None:
        if serve is None:
            serve = sorted(path.name for path in models.iterdir()) if models else []
        self.redis_url = redis_url
        self.models = models
        self._queues = ",".join(queue_of(model) for model in dict.fromkeys([*serve, *bad]))
        self.serve = [model for model in serve if model not in bad]
        self.name = name
        self._env = dict(env or {})
        self._args = list(args)
        self._names = names or Names()
        self._log: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        #: The incarnation with which it began, once it is ready.
        self.incarnation = ""

    def _begin(self) -> None:
        self.start()
        self.wait_ready()

    def _end(self) -> None:
        self.close()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the worker was not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        """All it has written to stdout and stderr."""
        return self._log.read_text(errors="replace") if self._log else ""

    def start(self) -> None:
        """Start the process; do not wait for it to serve."""
        with redis.Redis.from_url(self.redis_url) as client:
            self._before = {i for model in self.serve for i in self._serving(client, model)}
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "INFERQ_REDIS_URL": self.redis_url,
            **({"INFERQ_MODELS": str(self.models)} if self.models else {}),
            **self._env,
        }
        handle, path = tempfile.mkstemp(prefix=f"inferq-worker-{self.name}-", suffix=".log")
        self._log = Path(path)
        with open(handle, "wb") as log:
            self._process = start_child(self._command(), log, env=env)

    def _command(self) -> list[str]:
        return [
            sys.executable, "-m", "celery", "-A", "inferq.workers.app", "worker",
            "-P", "solo", "-Q", self._queues, "-n", f"{self.name}@%h", "--loglevel", "INFO",
            *self._args,
        ]  # fmt: skip

    def wait_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Wait until this worker announces every model that it serves.

        Two workers of one model must not be starting at once: they are told apart by who came.
        """
        with redis.Redis.from_url(self.redis_url) as client:
            for model in self.serve:
                what = f"worker {self.name} serves {model}"
                came = until(functools.partial(self._newcomers, client, model), timeout, what)
                self.incarnation = min(came)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def pause(self) -> None:
        """SIGSTOP, and wait until no thread runs any more: on a busy machine that takes a while."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: stopped(self.pid), what=f"worker {self.name} stands still")

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM; its exit status. AssertionError if it is not gone within `timeout` seconds."""
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"worker {self.name} runs on {timeout:g} s after SIGTERM; its log:\n"
                f"{self.log[-6000:]}"
            ) from None

    def close(self) -> None:
        """Leave nothing behind. Idempotent."""
        if self._process is not None:
            if self._process.poll() is None:
                self.resume()
                self._end_soon(self._process)
            end_child(self._process, STOP_TIMEOUT_S)
        if self._log is not None:
            self._log.unlink(missing_ok=True)
            self._log = None

    def _end_soon(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, which Celery's loop sees once a second, or whenever a broadcast arrives."""
        process.terminate()
        database = urlsplit(self.redis_url).path.strip("/") or "0"
        try:
            once = Retry(NoBackoff(), 0)
            with redis.Redis.from_url(self.redis_url, socket_timeout=0.5, retry=once) as client:
                for _ in range(WAKE_UPS):
                    client.publish(f"/{database}.celery.pidbox", FOR_NOBODY)
                    try:
                        process.wait(WAKE_UP_S)
                        return
                    except subprocess.TimeoutExpired:
                        continue
        except redis.RedisError:
            return  # no Redis, or one that lets nobody publish: it ends by itself

    def _explain(self) -> None:
        sys.stderr.write(f"--- log of worker {self.name} ---\n{self.log[-6000:]}\n")

    def _newcomers(self, client: redis.Redis, model: str) -> set[str]:
        """Incarnations that serve `model` since the start. AssertionError if this worker ended."""
        if not self.alive:
            raise AssertionError(f"worker {self.name} ended with {self.process.returncode}")
        return self._serving(client, model) - self._before

    def _serving(self, client: redis.Redis, model: str) -> set[str]:
        members = client.zrange(self._names.serving(model), 0, -1)
        return {str(member, "utf-8") for member in members if isinstance(member, bytes)}


class SupervisedWorker(Worker):
    """``inferq worker``: `pid` is the supervisor's, `child` the worker process itself."""

    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="inferq-heartbeat-")
        self.heartbeat = Path(self._folder.name) / "beat.json"
        self._env["INFERQ_HEARTBEAT_FILE"] = str(self.heartbeat)
        super().start()

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def child(self) -> int:
        """The pid of the worker process that serves now, waited for."""
        return until(self._serving_pid, START_TIMEOUT_S, "a child serves") or 0

    def _serving_pid(self) -> int | None:
        beat = read_beat(self.heartbeat)
        serves = beat is not None and beat.state == SERVING and self.alive
        return beat.pid if beat is not None and serves else None

    def _command(self) -> list[str]:
        return [
            sys.executable, "-m", "inferq.workers.cli", "worker", "--models", str(self.models),
            "-Q", self._queues, "--name", f"{self.name}@%h", *self._args,
        ]  # fmt: skip
