"""A worker that is told to end, or killed, loses nothing that a stock application asked for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis as redis_py
from celery import Celery
from celery.result import AsyncResult
from helpers.repository import fake_model
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names

NAMES = Names()
#: How long Celery's shutdown itself may take, in s: far less than a batch of "endless".
SHUTDOWN_S = 15.0
WAIT_S = 30.0

Send = Callable[..., AsyncResult]


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    with stock_app(redis_url) as app:
        yield app


@pytest.fixture
def send(app: Celery) -> Send:
    """Sends an echo of ``n`` to the model "m" as a stock application does."""

    def send(n: float, **options: object) -> AsyncResult:
        kwargs = {"model": "m", "inputs": {"x": [[n] * 4]}}
        return app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.m", **options)

    return send


@pytest.fixture
def models(tmp_path: Path) -> Callable[[float], Path]:
    """A repository whose one model, of the same name each time, takes so many seconds a request."""

    def make(seconds: float) -> Path:
        root = tmp_path / f"{seconds}"
        knobs = "max_batch_size = 1\nwarm_up = false"
        if not root.exists():
            fake_model(root, "m", knobs=knobs, fake=f"delay_ms = {seconds * 1000}")
        return root

    return make


Models = Callable[[float], Path]


def echoed(results: list[AsyncResult]) -> list[float]:
    """The answers, in order."""
    return [result.get(timeout=WAIT_S)["x"]["data"][0][0] for result in results]


def computes(redis: redis_py.Redis, worker: Worker) -> bool:
    return redis.scard(NAMES.running(worker.incarnation)) >= 1


def assert_nothing_is_held(redis: redis_py.Redis) -> None:
    """No lease, no claim, nothing running, nothing in kombu's care."""
    assert redis.keys("inferq:1:*") == [NAMES.model("m").encode()]
    assert not redis.exists("unacked", "unacked_index")


def test_sigterm_finishes_what_computes_and_hands_back_the_rest_in_order(
    redis: redis_py.Redis, redis_url: str, send: Send, models: Models
) -> None:
    with Worker(redis_url, models(1.0)) as worker:
        sent = [send(n) for n in range(6)]
        until(lambda: "ready." in worker.log, what="Celery is up")
        until(lambda: computes(redis, worker), what="one computes")
        assert worker.stop(SHUTDOWN_S) == 0
        done = sum(result.ready() for result in sent)
        assert 1 <= done < 6
        assert echoed(sent[:done]) == list(range(done))
        assert redis.llen(NAMES.queue("m")) == 6 - done
        assert_nothing_is_held(redis)
    with Worker(redis_url, models(0.0), name="second"):
        assert echoed(sent) == [0, 1, 2, 3, 4, 5]


def test_sigterm_hands_back_also_what_computes_once_the_grace_has_passed(
    redis: redis_py.Redis, redis_url: str, send: Send, models: Models
) -> None:
    with Worker(redis_url, models(600.0), env={"INFERQ_GRACE_S": "0.5"}) as worker:
        sent = [send(n) for n in range(3)]
        until(lambda: computes(redis, worker), what="the first computes")
        worker.stop(SHUTDOWN_S)
        assert redis.llen(NAMES.queue("m")) == 3
        assert_nothing_is_held(redis)
    with Worker(redis_url, models(0.0), name="second"):
        assert echoed(sent) == [0, 1, 2]


@pytest.mark.parametrize("first", [None, signal.SIGTERM], ids=["at once", "while it drains"])
def test_sigquit_hands_back_everything_without_waiting(
    redis: redis_py.Redis, redis_url: str, send: Send, models: Models, first: int | None
) -> None:
    with Worker(redis_url, models(600.0), env={"INFERQ_GRACE_S": "600"}) as worker:
        sent = [send(n) for n in range(3)]
        until(lambda: computes(redis, worker), what="the first computes")
        if first is not None:
            worker.process.send_signal(first)
            until(lambda: "Warm shutdown" in worker.log, what="it has begun to drain")
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(SHUTDOWN_S)
        assert redis.llen(NAMES.queue("m")) == 3
        assert_nothing_is_held(redis)
    with Worker(redis_url, models(0.0), name="second"):
        assert echoed(sent) == [0, 1, 2]


def test_a_soft_shutdown_finishes_what_it_can_in_its_time(
    redis: redis_py.Redis, redis_url: str, send: Send, models: Models, tmp_path: Path
) -> None:
    """SIGQUIT where worker_soft_shutdown_timeout is set: what ends within that is settled."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'celery' in ' '.join(sys.orig_argv):\n"
        "    from inferq.workers.app import app\n"
        "    app.conf.worker_soft_shutdown_timeout = 20.0\n"
    )
    path = os.pathsep.join([str(hook), *(each for each in sys.path if each)])
    with Worker(redis_url, models(1.0), env={"PYTHONPATH": path}) as worker:
        sent = [send(n) for n in range(4)]
        until(lambda: "ready." in worker.log, what="Celery is up")
        until(lambda: computes(redis, worker), what="one computes")
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(SHUTDOWN_S)
        done = sum(result.ready() for result in sent)
        assert 1 <= done < 4
        assert redis.llen(NAMES.queue("m")) == 4 - done
        assert_nothing_is_held(redis)
    with Worker(redis_url, models(0.0), name="second"):
        assert echoed(sent) == [0, 1, 2, 3]


def test_a_request_with_an_eta_outlives_the_worker_that_took_it(
    redis: redis_py.Redis, redis_url: str, send: Send, models: Models
) -> None:
    """It is served by whoever is there when it is due."""
    with Worker(redis_url, models(0.0)) as worker:
        sent = [send(7, countdown=4), send(8, countdown=2)]
        until(lambda: redis.zcard(NAMES.scheduled) == 2, what="both wait in Redis")
        worker.kill()
    with Worker(redis_url, models(0.0), name="second"):
        assert echoed(sent) == [7, 8]
