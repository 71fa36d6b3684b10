"""Celery's remote control tells the truth while batches run, and does as it is told."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from celery.result import AsyncResult
from helpers.repository import fake_model
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker
from redis.client import Monitor

from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis

#: What one batch of the model "slow" takes, in s: longer than any answer may.
SLOW_S = 1.0
ANSWER_S = 10.0
ROW = [[1.0, 2.0, 3.0, 4.0]]


@pytest.fixture(scope="module")
def worker(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "echo")
    fake_model(
        models,
        "slow",
        knobs="max_batch_size = 1\nwarm_up = false",
        fake=f"delay_ms = {SLOW_S * 1000}",
    )
    with (
        EmbeddedRedis(redis_kind) as server,
        redis_py.Redis.from_url(server.url) as store,
        Worker(server.url, models, env={"INFERQ_FOREIGN_TASKS": "1"}) as worker,
    ):
        until(lambda: celerys_connections(store), what="Celery listens for commands")
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    """A stock application, to ask with."""
    with stock_app(worker.redis_url) as app:
        yield app


@pytest.fixture
def store(worker: Worker) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(worker.redis_url) as client:
        yield client


def ask(app: Celery, command: str, **arguments: Any) -> Any:
    """The one worker's answer to a remote control command."""
    began = time.monotonic()
    (answers,) = app.control.broadcast(
        command, arguments=arguments, reply=True, limit=1, timeout=ANSWER_S
    )
    assert time.monotonic() - began < ANSWER_S
    (answer,) = answers.values()
    return answer


def send(app: Celery, model: str, inputs: object = None, **options: Any) -> AsyncResult:
    kwargs = {"model": model, "inputs": inputs or {"x": ROW}}
    return app.send_task("inferq.infer", kwargs=kwargs, queue=f"inferq.{model}", **options)


def ids(infos: list[dict[str, Any]]) -> list[str]:
    return [info["id"] for info in infos]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's output, with inferq importable as it is here."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_answers_while_a_batch_computes(app: Celery) -> None:
    """The main thread is never busy: one batch takes longer than all these answers."""
    running = send(app, "slow")
    until(lambda: ids(ask(app, "active")) == [running.id], what="it computes")
    began = time.monotonic()
    for _ in range(10):
        assert ask(app, "ping") == {"ok": "pong"}
    assert not running.ready()
    assert time.monotonic() - began < SLOW_S
    running.get(timeout=ANSWER_S)


def test_active_reserved_and_query_task_name_what_is_held(app: Celery) -> None:
    """One computes; one more is claimed and waits for the lane; the rest is in the queue."""
    began = time.time()
    sent = [send(app, "slow", priority=0) for _ in range(3)]
    until(lambda: len(ask(app, "reserved")) == 1, what="the lane is busy, and one waits")
    (computing,), (waiting,) = ask(app, "active"), ask(app, "reserved")
    assert [computing["id"], waiting["id"]] == [sent[0].id, sent[1].id]
    assert computing["name"] == computing["type"] == "inferq.infer"
    assert "'model': 'slow'" in computing["kwargs"]
    assert computing["hostname"].startswith("test@")
    assert began - 1 < computing["time_start"] < time.time() + 1
    assert waiting["time_start"] is None
    assert computing["delivery_info"]["routing_key"] == "inferq.slow"

    found = ask(app, "query_task", ids=[result.id for result in sent] + ["nobody"])
    assert {task_id: state for task_id, (state, _) in found.items()} == {
        sent[0].id: "active",
        sent[1].id: "reserved",
    }
    for result in sent:
        result.get(timeout=ANSWER_S)
    assert ask(app, "active") == ask(app, "reserved") == []


def test_stats_count_each_request_once(app: Celery) -> None:
    """Served or failed, at once or at an ETA."""

    def total() -> int:
        return int(ask(app, "stats")["total"].get("inferq.infer", 0))

    before = total()
    sent = [send(app, "echo") for _ in range(20)]
    sent += [send(app, "echo", {"y": ROW}), send(app, "echo", countdown=0.5)]
    for result in sent:
        result.get(timeout=ANSWER_S, propagate=False)
    until(lambda: total() == before + 22, what="22 more are counted")
    stats = ask(app, "stats")
    assert stats["inferq_models"] == "echo:1, slow:1"
    assert stats["inferq_engines"] == "echo: fake, slow: fake"
    assert stats["inferq_lanes"] == "echo: 1, slow: 1"
    assert stats["inferq_device"] == "cpu"
    assert f"inferq {version('inferq')}, celery {version('celery')}" in stats["inferq_versions"]
    fill = r"echo: \d+\.\d of \d+ rows, slow: (\d+\.\d of \d+ rows|no batch yet)"
    assert re.fullmatch(fill, stats["inferq_batch_fill"])
    assert stats["inferq_state"] == "serving"


def test_registered_and_active_queues_name_task_and_queues(app: Celery) -> None:
    assert ask(app, "registered") == ["inferq.infer"]
    queues = ask(app, "active_queues")
    assert [queue["name"] for queue in queues] == ["inferq.echo", "inferq.slow"]
    assert all(queue["routing_key"] == queue["name"] for queue in queues)


def test_the_celery_command_inspects(app: Celery, worker: Worker) -> None:
    sent = [send(app, "slow") for _ in range(20)]
    command = [sys.executable, "-m", "celery", "-A", "inferq.workers.app", "inspect", "--json"]
    done = run([*command, "active"], INFERQ_REDIS_URL=worker.redis_url)
    app.control.revoke([result.id for result in sent])
    assert done.returncode == 0, done.stderr
    ((name, infos),) = json.loads(done.stdout).items()
    assert name.startswith("test@")
    (computing,) = ids(infos)
    assert computing in {result.id for result in sent}
    until(lambda: all(result.ready() for result in sent), what="all have ended")


def test_a_cancelled_consumer_claims_nothing_until_it_is_added_again(
    app: Celery, store: redis_py.Redis
) -> None:
    assert "ok" in ask(app, "cancel_consumer", queue="inferq.echo")
    try:
        assert [queue["name"] for queue in ask(app, "active_queues")] == ["inferq.slow"]
        kept = send(app, "echo")
        send(app, "slow").get(timeout=ANSWER_S)
        assert store.llen(Names().queue("echo")) == 1
        assert not kept.ready()
    finally:
        assert "ok" in ask(app, "add_consumer", queue="inferq.echo")
    kept.get(timeout=ANSWER_S)
    assert len(ask(app, "active_queues")) == 2


def test_a_queue_of_ours_whose_model_is_not_loaded_is_refused(app: Celery) -> None:
    """Celery's own consumer would take its requests, and cannot serve them."""
    assert "not loaded here" in ask(app, "add_consumer", queue="inferq.other")["error"]
    assert len(ask(app, "active_queues")) == 2


def test_a_request_on_a_queue_that_is_none_of_ours_fails_with_the_named_error(app: Celery) -> None:
    """The operator may have the worker consume other queues as well: Celery does."""
    ask(app, "add_consumer", queue="plain")
    try:
        kwargs = {"model": "echo", "inputs": {"x": ROW}}
        now = app.send_task("inferq.infer", kwargs=kwargs, queue="plain")
        later = app.send_task("inferq.infer", kwargs=kwargs, queue="plain", countdown=0.5)
        for result in (now, later):
            error = result.get(timeout=ANSWER_S, propagate=False)
            assert (result.state, type(error).__name__) == ("FAILURE", "ModelNotFound")
            assert "'plain'" in str(error)
    finally:
        ask(app, "cancel_consumer", queue="plain")
    assert len(ask(app, "active_queues")) == 2


@pytest.mark.parametrize(
    "queue",
    ["inferq:1:later", "unacked", "test.celery.pidbox", "\n", "", "x" * 300, "a hash", "inferq."],
)
def test_a_key_that_is_no_queue_is_not_consumed(
    app: Celery, store: redis_py.Redis, queue: str
) -> None:
    store.hset("a hash", "x", "y")
    assert "error" in ask(app, "add_consumer", queue=queue)
    assert "error" in ask(app, "add_consumer", queue="plain", exchange_type="nonsense")
    assert len(ask(app, "active_queues")) == 2


def test_revoke_names_the_ids_it_flagged(app: Celery) -> None:
    busy, revoked = send(app, "slow"), send(app, "slow")
    answer = ask(app, "revoke", task_id=revoked.id)
    assert revoked.id in answer["ok"]
    busy.get(timeout=ANSWER_S)
    revoked.get(timeout=ANSWER_S, propagate=False)
    assert revoked.state == "REVOKED"


def test_a_lost_control_connection_disturbs_no_request_and_changes_no_queue(
    redis_kind: str, tmp_path: Path
) -> None:
    """Celery reconnects by itself. It never pops from our queues, neither before nor after."""
    fake_model(tmp_path, "slow", knobs="max_batch_size = 1", fake="delay_ms = 100.0")
    with (
        EmbeddedRedis(redis_kind) as server,
        redis_py.Redis.from_url(server.url) as store,
        store.monitor() as monitor,
        Worker(server.url, tmp_path) as worker,
        stock_app(server.url) as app,
    ):
        serve_while_celery_is_cut_off(app, store)
        assert [queue["name"] for queue in ask(app, "active_queues")] == ["inferq.slow"]
        assert ask(app, "stats")["total"] == {"inferq.infer": 41}
        assert "data plane's connection broke" not in worker.log
        assert not [command for command in seen(monitor) if popped_from_ours(command)]


def serve_while_celery_is_cut_off(app: Celery, store: redis_py.Redis) -> None:
    """40 requests, and one with an ETA: all are served."""
    sent = [send(app, "slow") for _ in range(40)]
    sent.append(send(app, "slow", countdown=3))
    for _ in range(3):
        before = until(lambda: celerys_connections(store), what="Celery listens for commands")
        for connection in before:
            store.client_kill_filter(_id=connection)
        until(functools.partial(listens_again, store, before))
        # It may hear events before it hears commands again.
        until(lambda: app.control.ping(timeout=2, limit=1), timeout=60, what="it hears commands")
    for result in sent:
        result.get(timeout=ANSWER_S)


def celerys_connections(store: redis_py.Redis) -> set[str]:
    """The ids of the connections on which a worker's Celery hears commands and events."""
    return {client["id"] for client in store.client_list() if client["psub"] != "0"}


def listens_again(store: redis_py.Redis, before: set[str]) -> set[str]:
    return celerys_connections(store) - before


def seen(monitor: Monitor) -> Iterator[str]:
    """The commands that Redis has executed since the monitor was opened."""
    while monitor.connection.can_read(timeout=0.1):
        yield monitor.next_command()["command"]  # type: ignore[no-untyped-call]


def popped_from_ours(command: str) -> bool:
    name, _, keys = command.partition(" ")
    return name.upper() in {"BRPOP", "RPOP", "LPOP", "BLPOP"} and "inferq." in keys


REFUSED = {
    "prefork": (["-P", "prefork", "-Q", "inferq.echo"], "-P solo"),
    "threads": (["-P", "threads", "-Q", "inferq.echo"], "-P solo"),
    "autoscale": (["--autoscale", "4,1", "-Q", "inferq.echo"], "--autoscale refused"),
    "no queue": ([], "-Q inferq.<model>"),
    "no queue of ours": (["-Q", "plain"], "expected inferq.<model>"),
    "unknown model": (["-Q", "inferq.nope"], "nope"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_worker_that_cannot_serve_says_so_in_one_line_and_ends(
    worker: Worker, options: list[str], said: str
) -> None:
    done = run(
        [sys.executable, "-m", "celery", "-A", "inferq.workers.app", "worker", *options],
        INFERQ_REDIS_URL=worker.redis_url, INFERQ_MODELS=str(worker.models),
    )  # fmt: skip
    assert done.returncode not in (0, -9)
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "inferq" in line]
    assert len(lines) == 1, done.stderr + done.stdout
    assert said in lines[0]
