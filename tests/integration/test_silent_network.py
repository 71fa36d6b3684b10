"""A network that carries nothing and ends no connection: every half of a worker gives it up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from celery.result import AsyncResult
from chaos.proxy import Proxy
from helpers.flower import FlowerProcess
from helpers.repository import fake_model
from helpers.results import NAMES
from helpers.stock import let_go
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.celery_app import make_app
from inferq.shared.settings import Settings
from inferq.workers.data_plane.plane import MAX_AWAY_IN_CANVAS
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.supervision.health import problem_of, read_beat

#: More than may wait for their links before nothing is claimed any more.
LINKED = MAX_AWAY_IN_CANVAS + 44
#: Seconds within which remote control answers again.
CONTROL_S = 30.0
INPUTS = {"x": [[1.0, 2.0, 3.0, 4.0]]}
ELSEWHERE = "elsewhere"


@pytest.fixture
def server(new_redis: Callable[..., EmbeddedRedis]) -> EmbeddedRedis:
    return new_redis()


@pytest.fixture
def app(server: EmbeddedRedis) -> Iterator[Celery]:
    app = make_app(Settings.load(redis_url=server.url))
    yield app
    let_go(app)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs="lanes = 1\nwarm_up = false")
    return root


def send(app: Celery, *, linked: bool) -> AsyncResult[Any]:
    link = [app.signature("other.task", queue=ELSEWHERE)] if linked else None
    return app.send_task("inferq.infer", kwargs={"inputs": INPUTS}, queue="inferq.m", link=link)


def answered(redis: redis_py.Redis, sent: list[AsyncResult[Any]]) -> int:
    return int(redis.exists(*[NAMES.meta(each.id) for each in sent]))


def pinged(app: Celery) -> bool:
    return bool(app.control.inspect(timeout=1.0, limit=1).ping())


@pytest.mark.parametrize("also_new", [False, True], ids=["the-open-ones", "new-ones-too"])
def test_after_a_silent_network_links_are_published_and_remote_control_answers(
    server: EmbeddedRedis, app: Celery, models: Path, tmp_path: Path, also_new: bool
) -> None:
    beat = tmp_path / "beat.json"
    with (
        redis_py.Redis.from_url(server.url) as redis,
        Proxy(server.port, ["worker"]) as proxy,
        Worker(proxy.url("worker"), models, env={"INFERQ_HEARTBEAT_FILE": str(beat)}) as worker,
    ):
        first = send(app, linked=True)
        until(lambda: answered(redis, [first]), what="a request with a link is answered")
        until(lambda: pinged(app), what="remote control answers")
        heal = (proxy.silence if also_new else proxy.swallow)(["worker"])
        sent = [send(app, linked=True) for _ in range(LINKED)]
        if also_new:
            until(lambda: worker.log.count("connection broke") >= 3, 40.0, "it tries in vain")
            heal()
        until(lambda: answered(redis, sent) == LINKED, 40.0, "all with links are answered")
        assert int(redis.llen(ELSEWHERE)) >= LINKED + 1, "published at least once each"
        until(lambda: pinged(app), CONTROL_S, "remote control answers again")
        plain = send(app, linked=False)
        until(lambda: answered(redis, [plain]), what="one without links is answered")
        found = read_beat(beat)
        assert found is not None
        assert problem_of(found) is None
        assert worker.alive


def test_the_kernel_watches_every_connection_of_a_worker_to_redis(
    server: EmbeddedRedis, app: Celery, models: Path
) -> None:
    """By keepalive: a peer that vanished is noticed also where nobody writes."""
    with Worker(server.url, models) as worker:
        linked = send(app, linked=True)
        with redis_py.Redis.from_url(server.url) as redis:
            until(lambda: answered(redis, [linked]), what="the canvas is connected too")
        until(lambda: pinged(app), what="remote control is connected")
        until(lambda: len(timers(worker.pid, server.port)) >= 8, what="its connections are open")
        until(lambda: set(timers(worker.pid, server.port)) == {KEEPALIVE}, what="all are watched")


#: What /proc/net/tcp calls the timer that is running.
KEEPALIVE = "02"


def timers(pid: int, port: int) -> list[str]:
    """The running timer of each established connection of process `pid` to `port` here."""
    sockets = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [
        line[5].partition(":")[0]
        for line in lines
        if line[3] == "01" and line[2].endswith(f":{port:04X}") and f"socket:[{line[9]}]" in sockets
    ]


def test_flower_hears_of_workers_again_after_a_silent_network(
    server: EmbeddedRedis, models: Path
) -> None:
    """Its connection for events only listens: kombu itself would never notice."""
    with (
        Proxy(server.port, ["flower"]) as proxy,
        Worker(server.url, models, name="first"),
        FlowerProcess(proxy.url("flower")) as flower,
    ):

        def known() -> str:
            return flower.get("/workers?json=1").body

        until(lambda: "first@" in known(), what="it knows the first worker")
        proxy.swallow(["flower"])
        with Worker(server.url, models, name="second"):
            until(lambda: "second@" in known(), CONTROL_S, "it knows the second worker")
