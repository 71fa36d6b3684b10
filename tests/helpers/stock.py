"""Stock Celery around inferq: a producer and a worker, each a process that never imports inferq."""

from __future__ import annotations

import inspect
import json
import os
import select
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery

from helpers.scoped import Scoped
from inferq.workers.process.children import end_child, start_child

HERE = Path(__file__).parent
#: Celery untouched, and one set up for bytes.
CONTENTS = ("json", "msgpack")
#: Longest that one function sent to a `Side` may take, in seconds.
CALL_TIMEOUT_S = 90.0


def stock_environment(redis_url: str, content: str) -> dict[str, str]:
    """The environment of a stock process: nothing in it points at inferq."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("INFERQ_", "PYTHON"))}
    return {
        **kept,
        "CELERY_BROKER_URL": redis_url,
        "CELERY_RESULT_BACKEND": redis_url,
        "STOCK_CONTENT": content,
    }


@contextmanager
def stock_app(redis_url: str) -> Iterator[Celery]:
    """A stock application in this process."""
    app = Celery("stock", broker=redis_url, backend=redis_url, set_as_current=False)
    # kombu's pools belong to the process: a test before may have killed what is in them.
    app.conf.broker_pool_limit = 0
    try:
        yield app
    finally:
        let_go(app)


def let_go(app: Celery) -> None:
    """Close `app` for good.

    Its results are in reference cycles. One that is collected later must not unsubscribe from a
    Redis that is gone by then: that raises wherever the collection happens to come in between.
    """
    app.backend.result_consumer.stop()
    app.backend.result_consumer._pubsub = None
    app.close()


class Side(Scoped):
    """A stock producer. ``side(function, *args)`` runs `function` there and returns its value.

    The function's source is what travels: it may use the names in `stock_side` and its arguments,
    nothing else. Arguments and value are JSON. AssertionError if it raises, or inferq was imported.
    """

    def __init__(self, redis_url: str, content: str) -> None:
        self._redis_url = redis_url
        self.content = content
        self._process: subprocess.Popen[str] | None = None

    def _begin(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "stock_side.py"],
            cwd=HERE,
            env=stock_environment(self._redis_url, self.content),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        process = self._process
        assert process is not None, "the stock producer was not started"
        assert process.stdin is not None
        assert process.stdout is not None
        source = textwrap.dedent(inspect.getsource(function))
        call = {"source": source, "name": function.__name__, "args": args}
        process.stdin.write(json.dumps(call) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], CALL_TIMEOUT_S)
        assert ready, f"{function.__name__} was not done in {CALL_TIMEOUT_S:g} s"
        line = process.stdout.readline()
        assert line, f"the stock producer ended in {function.__name__}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        assert not answer["inferq"], f"the stock side imported {answer['inferq']}"
        return answer["value"]


class PlainWorker(Scoped):
    """A stock worker of `stock_side`'s plain tasks. What is sent before it is up waits for it.

    `queue`: another than theirs.
    """

    def __init__(self, redis_url: str, content: str, queue: str | None = None) -> None:
        self._redis_url = redis_url
        self._content = content
        self._queue = queue or f"plain.{content}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen[bytes] | None = None

    def _begin(self) -> None:
        command = [
            sys.executable, "-m", "celery", "-A", "stock_side", "worker", "-P", "solo",
            "-Q", self._queue, "-n", f"plain-{self._content}@%h",
            "--without-gossip", "--without-mingle", "--loglevel", "INFO",
        ]  # fmt: skip
        environment = stock_environment(self._redis_url, self._content)
        self._process = start_child(command, self._log, env=environment, cwd=HERE)

    def _explain(self) -> None:
        self._log.seek(0)
        sys.stderr.write(f"--- log of the plain worker ---\n{self._log.read().decode()}\n")

    def _end(self) -> None:
        if self._process is not None:
            end_child(self._process, timeout=10)
        self._log.close()
