"""Everything works under the users of deploy/redis/users.acl, and none is refused anything."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from click.testing import CliRunner
from helpers.acl import Users
from helpers.flower import FlowerProcess
from helpers.repository import fake_model, numbered
from helpers.results import held_by, nothing_is_held
from helpers.stock import CONTENTS, PlainWorker, Side
from helpers.stock_side import (
    WAIT_S,
    app,
    chain,
    chord,
    ending,
    group,
    infer,
    send,
    uuid,
    values,
)
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker

from inferq.producer import AsyncClient, Client
from inferq.producer.outgoing import INLINE_LIMIT
from inferq.shared.errors import InferqError
from inferq.shared.names import Names
from inferq.workers.cli import inferq
from inferq.workers.engines.fake import FAULT_RAISE
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
WIDE = INLINE_LIMIT // 2
#: Where the application's own worker takes its tasks from: Celery's default.
QUEUE = "celery"
#: What its producers and workers need for that beside their roles (docs/deploy.md).
PUSHES = (
    "%W~celery",
    "%W~celery??[369]",
    "(+sadd %W~_kombu.binding.celery %W~_kombu.binding_permanent.celery)",
)
TAKES = ("~celery", "~celery??[369]")


@pytest.fixture(scope="module")
def server(redis_kind: str) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(redis_kind) as server:
        yield server


@pytest.fixture(scope="module")
def everyone(server: EmbeddedRedis) -> Iterator[Users]:
    with Users(server.url) as users:
        yield users


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    fake_model(root, "echo", fake="faults = true")
    fake_model(root, "wide", width=WIDE)
    fake_model(root, "slow", knobs="max_batch_size = 1", fake="delay_ms = 100.0")
    return root


@pytest.fixture(scope="module")
def worker(everyone: Users, models: Path) -> Iterator[Worker]:
    with SupervisedWorker(everyone.url("worker"), models) as worker:
        yield worker


@pytest.fixture
def store(server: EmbeddedRedis) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def refused() -> list[str]:
    """What a test expects to be refused."""
    return []


@pytest.fixture(autouse=True)
def nobody_is_refused(
    everyone: Users, worker: Worker, store: redis_py.Redis, refused: list[str]
) -> Iterator[None]:
    """Neither by what Redis has logged, nor by what the worker has."""
    store.acl_log_reset()
    before = len(worker.log)
    yield
    assert set(everyone.refused()) <= set(refused)
    for word in ("NOPERM", "permission"):
        assert refused or word not in worker.log[before:], worker.log[-4000:]


# --- clients of inferq ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["producer", "canceller"])
def test_a_client_asks_one_and_many_and_sends_large_tensors(everyone: Users, role: str) -> None:
    wide = np.ones((4, WIDE), np.float32)
    with Client(everyone.url(role)) as client:
        np.testing.assert_array_equal(
            client.infer("echo", {"x": numbered(3)}).outputs["x"], numbered(3)
        )
        np.testing.assert_array_equal(client.infer("wide", {"x": wide}).outputs["x"], wide)
        found = client.map("echo", ({"x": numbered(n)} for n in range(300)))
        assert [result.outputs["x"][0, 0] for result in found] == list(range(300))
        with pytest.raises(InferqError):
            client.infer("echo", {"x": numbered(FAULT_RAISE)})
        pending = client.submit("echo", {"x": numbered(5)}, priority=9, timeout_ms=20_000)
        np.testing.assert_array_equal(pending.result(WAIT_S).outputs["x"], numbered(5))


def test_an_async_client_asks_one_and_many_and_sends_large_tensors(everyone: Users) -> None:
    wide = np.ones((4, WIDE), np.float32)

    async def ask() -> list[float]:
        async with AsyncClient(everyone.url("producer")) as client:
            result = await client.infer("wide", {"x": wide})
            np.testing.assert_array_equal(result.outputs["x"], wide)
            items = ({"x": numbered(n)} for n in range(300))
            return [result.outputs["x"][0, 0] async for result in client.map("echo", items)]

    assert asyncio.run(ask()) == list(range(300))


def test_a_canceller_cancels_by_both_clients(everyone: Users) -> None:
    async def cancel() -> bool:
        async with AsyncClient(everyone.url("canceller")) as client:
            _, second = [await client.submit("slow", {"x": numbered(n)}) for n in range(2)]
            return await second.cancel()

    with Client(everyone.url("canceller")) as client:
        _, second = [client.submit("slow", {"x": numbered(n)}) for n in range(2)]
        assert second.cancel()
    assert asyncio.run(cancel())


# --- applications of Celery ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=CONTENTS)
def content(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tasks(everyone: Users, content: str) -> Iterator[None]:
    """An application's own worker."""
    with PlainWorker(everyone.url("worker", *TAKES), content, QUEUE):
        yield


@pytest.fixture(scope="module")
def side(everyone: Users, content: str, tasks: None) -> Iterator[Side]:
    with Side(everyone.url("producer", *PUSHES), content) as side:
        yield side


@pytest.fixture(scope="module")
def cancelling(everyone: Users, content: str) -> Iterator[Side]:
    with Side(everyone.url("canceller"), content) as side:
        yield side


def test_a_stock_producer_reads_results_polls_and_sends_with_an_eta(side: Side) -> None:
    def ask(fault: int) -> object:
        results = [send("echo", 1), send("slow", 2, countdown=1), send("echo", 3, priority=9)]
        answers = [values(result.get(timeout=WAIT_S))[0] for result in results]
        again = app.AsyncResult(results[0].id)
        failed = ending(send("echo", fault))
        late = ending(send("echo", 1, countdown=1, expires=0.5))
        return [answers, again.state, again.ready(), failed[:2], late[:2]]

    answers, state, ready, failed, late = side(ask, FAULT_RAISE)
    assert (answers, state, ready) == ([1, 2, 3], "SUCCESS", True)
    assert failed == ["FAILURE", "EngineError"]
    assert late == ["REVOKED", "TaskRevokedError"]


def test_links_chains_groups_and_chords_of_a_stock_producer_work(side: Side) -> None:
    def ask(queue: str) -> object:
        def plain(task: str, *args: Any) -> Any:
            return app.signature(f"stock.{task}", args=args, queue=queue)

        linked = plain("total").set(task_id=uuid())
        send("echo", 5, link=linked).get(timeout=WAIT_S)
        chained = chain(plain("inputs", 2), infer("echo"), infer("slow"), plain("total"))
        parts = group(infer("echo", n) for n in range(1, 20))
        header = [infer("echo", 1), plain("plus", 2, 3), infer("slow", 4)]
        body = chord(header)(plain("totals"))
        through = chain(group(infer("echo", 1), infer("slow", 2)), plain("merge"), infer("echo"))
        return [
            app.AsyncResult(linked.id).get(timeout=WAIT_S),
            chained.apply_async().get(timeout=WAIT_S),
            [values(each)[0] for each in parts.apply_async().get(timeout=WAIT_S)],
            body.get(timeout=WAIT_S),
            values(through.apply_async().get(timeout=WAIT_S)),
        ]

    assert side(ask, QUEUE) == [20, 8, list(range(1, 20)), [4, 5, 16], [12] * 4]


def test_a_link_to_a_queue_that_workers_may_not_write_to_fails_its_request(
    side: Side, refused: list[str]
) -> None:
    def ask() -> object:
        link = app.signature("stock.total", queue="mail")
        return [ending(send("echo", 1, link=link)), values(send("echo", 2).get(timeout=WAIT_S))]

    refused.append("worker: key mail (by lpush, toplevel)")
    (state, _, message), served = side(ask)
    assert (state, served) == ("FAILURE", [2] * 4)
    assert "permission" in message


def test_a_stock_canceller_revokes(cancelling: Side) -> None:
    def ask() -> object:
        before = [send("slow", n) for n in range(4)]
        revoked = [send("slow", 99), send("slow", 99, countdown=4)]
        app.control.revoke([result.id for result in revoked])
        endings = [ending(result)[:2] for result in revoked]
        return [endings, [values(result.get(timeout=WAIT_S))[0] for result in before]]

    gone = ["REVOKED", "TaskRevokedError"]
    assert cancelling(ask) == [[gone, gone], [0, 1, 2, 3]]


# --- workers -------------------------------------------------------------------------------------


def test_what_a_killed_worker_held_is_served_by_another(
    everyone: Users, store: redis_py.Redis, tmp_path: Path
) -> None:
    fake_model(tmp_path, "lone", knobs="max_batch_size = 1", fake="delay_ms = 200.0")
    lease = {"INFERQ_LEASE_S": "2"}
    with Client(everyone.url("producer")) as client:
        with Worker(everyone.url("worker"), tmp_path, name="victim", env=lease) as victim:
            asked = [client.submit("lone", {"x": numbered(n)}) for n in range(20)]
            until(lambda: held_by(store, victim.incarnation) > 1, what="it holds some")
            victim.kill()
            assert "permission" not in victim.log
        with Worker(everyone.url("worker"), tmp_path, name="heir", env=lease) as heir:
            found = [pending.result(WAIT_S).outputs["x"][0, 0] for pending in asked]
            assert heir.stop() == 0
            assert "permission" not in heir.log
    assert found == list(range(20))
    until(lambda: nothing_is_held(store), what="nothing is held")


def test_a_worker_keeps_dead_letters_and_its_user_may_list_replay_and_drop_them(
    everyone: Users, store: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*args: str) -> Any:
        run = CliRunner().invoke(inferq, ["dead", *args, "--json"])
        assert run.exit_code == 0, run.output
        return json.loads(run.stdout)

    monkeypatch.setenv("INFERQ_REDIS_URL", everyone.url("worker"))
    with Client(everyone.url("producer")) as client:
        assert client.infer("echo", {"x": numbered(1)})
    everyone.push_only().lpush(NAMES.queue("echo"), b"no message")
    until(lambda: store.llen(NAMES.dead("echo")), what="it is a dead letter")
    (letter,) = dead("list", "echo")
    assert dead("show", letter["id"])
    assert dead("drop", letter["id"])
    assert dead("list") == []


# --- whoever watches ------------------------------------------------------------------------------


Command = Callable[..., Any]


@pytest.fixture
def node() -> str:
    """The node name of the worker."""
    return f"test@{socket.gethostname()}"


@pytest.fixture
def told(everyone: Users, monkeypatch: pytest.MonkeyPatch) -> Command:
    """What a command tells a watcher, as JSON."""
    monkeypatch.setenv("INFERQ_REDIS_URL", everyone.url("watcher"))

    def ask(*args: str) -> Any:
        run = CliRunner().invoke(inferq, [*args, "--json"])
        assert run.stdout, run.output
        return json.loads(run.stdout)

    return ask


def test_a_watcher_sees_queues_and_workers_in_commands(
    told: Command, store: redis_py.Redis, refused: list[str]
) -> None:
    """All but the settings of Redis, among which are its passwords."""
    store.lpush(NAMES.queue("nobodys", 3), "x")
    found = {each["model"]: each for each in told("queues")["models"]}
    assert found["nobodys"]["depth"] == 1
    assert found["echo"]["consumers"] == 1
    store.delete(NAMES.queue("nobodys", 3))
    levels = {each["check"]: each["level"] for each in told("doctor")}
    assert [check for check, level in levels.items() if level == "error"] == []
    assert any(check.startswith("worker ") for check in levels), levels
    refused.append("watcher: command config|get (by config|get, toplevel)")


def test_a_watcher_sees_queues_workers_and_tasks_in_flower(everyone: Users, node: str) -> None:
    with (
        FlowerProcess(everyone.url("watcher")) as flower,
        Client(everyone.url("producer")) as client,
    ):

        def seen() -> bool:
            client.infer("echo", {"x": numbered(1)})
            data = flower.get("/inference/data").json()
            workers = flower.get("/api/workers").json()
            tasks = flower.get("/api/tasks").json()
            return bool("echo" in json.dumps(data) and node in workers and tasks)

        until(seen, 30.0, "Flower shows models, workers and tasks")
        refreshed = flower.get(f"/api/workers?refresh=1&workername={node}").json()
        assert "active_queues" in refreshed[node], refreshed
        assert "NOPERM" not in flower.log
        assert "permission" not in flower.log


@pytest.fixture
def taken_long_ago(store: redis_py.Redis, refused: list[str]) -> Iterator[None]:
    """A message that a worker of another application took and never acknowledged.

    Kombu lets every consumer put it back into its queue, which no role may write to.
    """
    told = {"exchange": "", "routing_key": "another.queue"}
    message = {"body": "", "headers": {}, "properties": {"delivery_info": told}}
    store.hset("unacked", "tag", json.dumps([message, "", "another.queue"]))
    store.zadd("unacked_index", {"tag": 1.0})
    refused.append("worker: key another.queue (by type, toplevel)")
    yield
    store.delete("unacked", "unacked_index")


TOLD = "kombu's unacked holds a message of a queue that this process' Redis user may not write to"


@pytest.mark.usefixtures("taken_long_ago")
def test_what_another_application_never_acknowledged_disturbs_no_worker(
    everyone: Users, worker: Worker, models: Path, tmp_path: Path
) -> None:
    """Neither one that runs nor one that starts."""
    until(lambda: TOLD in worker.log, 30.0, "the worker has tried it")
    fake_model(tmp_path, "late")
    with Worker(everyone.url("worker"), tmp_path, name="late") as late:
        until(lambda: "late@" in late.log and "ready" in late.log, 30.0, "Celery is ready")
        until(lambda: TOLD in late.log, 30.0, "it has tried it, too")
        assert "Trying to reconnect" not in late.log
        assert late.stop() == 0
    assert "Traceback" not in late.log
    for each in (worker, late):
        assert each.log.count(TOLD) <= 1


@pytest.mark.usefixtures("taken_long_ago")
def test_what_another_application_never_acknowledged_disturbs_no_watcher(
    everyone: Users, told: Command, refused: list[str], node: str
) -> None:
    with FlowerProcess(everyone.url("watcher")) as flower:
        until(lambda: node in flower.get("/api/workers").json(), 30.0, "Flower shows the worker")
        for _ in range(10):  # kombu tries it at every tenth answer
            levels = {each["check"]: each["level"] for each in told("doctor")}
            assert levels[f"worker {node}"] == "ok"
            refreshed = flower.get(f"/api/workers?refresh=1&workername={node}").json()
            assert "active_queues" in refreshed[node], refreshed
        until(lambda: TOLD in flower.log, 30.0, "Flower has tried it, too")
        assert "failed" not in flower.log
    refused.append("watcher: command config|get (by config|get, toplevel)")
    refused.append("watcher: command watch (by watch, toplevel)")
