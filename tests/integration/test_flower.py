"""``inferq flower``: depths are right with and without workers, and strangers see nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from helpers.flower import FlowerProcess
from helpers.repository import fake_model, message, numbered
from helpers.responder import advert, announce
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names
from inferq.workers.flower import CONF
from inferq.workers.flower.readings import PATIENCE_S
from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import EmbeddedRedis, find_server, free_port

NAMES = Names()
#: Every page and endpoint of ours, and what Flower leaves open to everybody but its health.
PAGES = ["/", "/broker", "/inference", "/inference/data", "/inference/inference.js", "/metrics"]


@pytest.fixture(scope="module")
def server(redis_kind: str) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(redis_kind) as server:
        yield server


@pytest.fixture(scope="module")
def flower(server: EmbeddedRedis) -> Iterator[FlowerProcess]:
    with FlowerProcess(server.url) as flower:
        yield flower


@pytest.fixture
def store(server: EmbeddedRedis) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def lengths(flower: FlowerProcess) -> dict[str, dict[str, Any]]:
    """What the Broker page's API says, by queue."""
    reply = flower.get("/api/queues/length")
    assert reply.status == 200, reply.body
    return {queue["name"]: queue for queue in reply.json()["active_queues"]}


def enqueue(store: redis_py.Redis, model: str, priorities: list[int]) -> None:
    for priority in priorities:
        _, raw = message(model, numbered(1), priority=priority)
        store.lpush(NAMES.queue(model, priority), raw)


def test_a_queue_that_no_worker_consumes_keeps_its_depth_with_priorities_summed(
    flower: FlowerProcess, store: redis_py.Redis
) -> None:
    enqueue(store, "alone", [0, 0, 3, 6, 9, 9])
    store.lpush(NAMES.dead("alone"), b"a letter")
    store.lpush("celery", "x")
    until(lambda: lengths(flower).get("inferq.alone", {}).get("messages") == 6)
    queue = lengths(flower)["inferq.alone"]
    assert queue["by_priority"] == {"0": 2, "3": 1, "6": 1, "9": 2}
    assert (queue["consumers"], queue["dead_letters"], queue["later"]) == (0, 1, 0)
    until(lambda: lengths(flower)["celery"] == {"name": "celery", "messages": 1})
    page = flower.get("/broker").body
    row = page.partition('data-queue="inferq.alone"')[2].partition("</tr>")[0]
    assert re.search(r'data-field="waiting">6<', row)
    assert "0: 2, 3: 1, 6: 1, 9: 2" in row
    assert "no worker consumes it" in row
    # And it follows what happens.
    store.delete(NAMES.queue("alone", 9))
    until(lambda: lengths(flower)["inferq.alone"]["messages"] == 4)


def test_metrics_hold_the_depths_beside_flowers_own(
    flower: FlowerProcess, store: redis_py.Redis
) -> None:
    enqueue(store, "m", [0, 9, 9])
    enqueue(store, "nobody-announced-it", [0])
    announce(store, advert("m"), live=False)
    reply = flower.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    lines = reply.body.splitlines()
    assert 'inferq_queue_depth{model="m",priority="9"} 2.0' in lines
    assert 'inferq_queue_consumers{model="m"} 0.0' in lines
    assert "inferq_queues_unannounced 1.0" in lines
    assert "nobody-announced-it" not in reply.body
    assert any(line.startswith("# TYPE flower_events_total") for line in lines)


def test_what_a_worker_claimed_stands_beside_what_waits(
    flower: FlowerProcess, server: EmbeddedRedis, store: redis_py.Redis, tmp_path: Path
) -> None:
    knobs = "lanes = 1\nmax_batch_size = 1\nwarm_up = false\nmax_queue_depth = 10"
    fake_model(tmp_path, "slow", knobs=knobs, fake="delay_ms = 60000")
    with Worker(server.url, tmp_path, args=["--without-heartbeat"]) as worker:
        enqueue(store, "slow", [0] * 9)

        def agrees() -> bool:
            queue = lengths(flower).get("inferq.slow", {})
            claimed = 9 - int(str(store.llen("inferq.slow")))
            told = (queue.get("messages"), queue.get("messages_unacknowledged"))
            return claimed > 0 and told == (9 - claimed, claimed)

        until(agrees, 30.0)
        queue = lengths(flower)["inferq.slow"]
        assert (queue["consumers"], queue["limit"]) == (1, 10)
        worker.kill()


def test_a_name_from_redis_is_no_markup_on_the_broker_page(
    flower: FlowerProcess, store: redis_py.Redis
) -> None:
    store.lpush("inferq.<script>alert(1)</script>", "x")
    enqueue(store, "fine", [0])
    until(lambda: "inferq.fine" in lengths(flower))
    assert "<script>alert" not in flower.get("/broker").body


def test_the_pages_say_that_redis_is_away_and_come_back_with_it(
    new_redis: Callable[..., EmbeddedRedis],
) -> None:
    server = new_redis(appendonly=True)
    with FlowerProcess(server.url) as flower, redis_py.Redis.from_url(server.url) as store:
        enqueue(store, "m", [0, 3])
        until(lambda: lengths(flower)["inferq.m"]["messages"] == 2)
        server.kill()
        until(lambda: flower.get("/api/queues/length").status == 503)
        assert "Redis" in flower.get("/api/queues/length").body
        page = flower.get("/broker").body
        assert 'id="broker-problem"' in page
        assert 'data-queue="inferq.m"' in page, "what was read before is shown"
        assert flower.get("/healthcheck").status == 200
        server.start()
        until(lambda: flower.get("/api/queues/length").status == 200)


def test_flower_starts_without_a_redis_and_finds_it_later(
    new_redis: Callable[..., EmbeddedRedis],
) -> None:
    server = new_redis(appendonly=True)
    server.kill()
    with FlowerProcess(server.url) as flower:
        told = flower.get("/inference/data").json()
        assert "Redis" in told["problem"]
        assert (told["age_s"], told["models"]) == (None, [])
        assert flower.get("/inference").status == flower.get("/broker").status == 200
        assert "inferq_redis_up 0.0" in flower.get("/metrics").body
        server.start()
        with redis_py.Redis.from_url(server.url) as store:
            enqueue(store, "m", [0])
        until(lambda: [m["depth"] for m in flower.get("/inference/data").json()["models"]] == [1])


def test_a_redis_that_hangs_holds_up_no_other_page(
    new_redis: Callable[..., EmbeddedRedis],
) -> None:
    server = new_redis()
    with FlowerProcess(server.url) as flower, redis_py.Redis.from_url(server.url) as store:
        enqueue(store, "m", [0])
        until(lambda: lengths(flower)["inferq.m"]["messages"] == 1)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(1) as pool:
                until(lambda: flower.get("/api/queues/length").status == 503)
                page = pool.submit(flower.get, "/broker")
                while not page.done():
                    began = time.monotonic()
                    assert flower.get("/healthcheck").status == 200
                    assert time.monotonic() - began < PATIENCE_S
            assert 'id="broker-problem"' in page.result().body
            data = flower.get("/inference/data").json()
            assert "Redis" in data["problem"]
            assert data["models"][0]["depth"] == 1
        finally:
            os.kill(server.pid, signal.SIGCONT)
        until(lambda: flower.get("/inference/data").json()["problem"] is None)


@pytest.mark.parametrize("path", PAGES)
def test_with_a_password_every_page_asks_for_it(guarded: FlowerProcess, path: str) -> None:
    for wrong in (None, "ops:wrong", "ops:", "other:s3cret-word"):
        refused = guarded.get(path, wrong)
        assert refused.status == 401, path
        assert refused.headers["www-authenticate"].startswith("Basic")
    assert guarded.get(path, "ops:s3cret-word").status == 200
    assert guarded.get("/healthcheck").status == 200
    assert "s3cret-word" not in guarded.log
    commands = Path(f"/proc/{guarded.process.pid}/cmdline")
    assert not commands.exists() or b"s3cret-word" not in commands.read_bytes()


@pytest.fixture(scope="module")
def guarded(server: EmbeddedRedis) -> Iterator[FlowerProcess]:
    env = {"INFERQ_FLOWER_BASIC_AUTH": "ops:s3cret-word"}
    with FlowerProcess(server.url, env=env, args=["--debug=true"]) as flower:
        yield flower


@pytest.mark.parametrize("celery", [None, [f"--conf={CONF}", "--address=0.0.0.0"]])
def test_off_loopback_a_password_is_made_and_told_once(
    server: EmbeddedRedis, celery: list[str] | None
) -> None:
    with FlowerProcess(server.url, address="0.0.0.0", celery=celery) as flower:
        assert flower.get("/inference").status == 401
        made = re.findall(r"the user is (\S+) and the password (\S+)", flower.log)
        assert len(made) == 1
        ((user, password),) = made
        assert flower.get("/inference", f"{user}:{password}").status == 200
        assert flower.log.count(password) == 1


def test_celerys_own_command_listens_on_loopback_with_the_same_pages(
    server: EmbeddedRedis, store: redis_py.Redis
) -> None:
    with FlowerProcess(server.url, celery=[f"--conf={CONF}"], prefix="/ops") as flower:
        assert flower.get("/inference").status == 200
        page = flower.get("/broker").body
        assert 'href="/ops/inference"' in page
        assert "http://127.0.0.1:" in flower.log


def _patched(folder: Path, code: str) -> Path:
    """A folder that makes Python run `code` at its start."""
    (folder / "sitecustomize.py").write_text(code)
    return folder


def test_a_newer_flower_warns_and_shows_its_own_pages(
    server: EmbeddedRedis, store: redis_py.Redis, tmp_path: Path
) -> None:
    folder = _patched(tmp_path, "import flower\nflower.__version__ = '2.3.0'\n")
    env = {"INFERQ_FLOWER_BASIC_AUTH": "a:b"}
    with FlowerProcess(server.url, folders=[folder], env=env) as flower:
        assert "Flower 2.3.0 was not tested with this inferq" in flower.log
        assert flower.get("/inference", "a:b").status == 404
        assert "Unacked" in flower.get("/broker", "a:b").body
        assert flower.get("/broker").status == 401


def test_a_flower_that_was_put_together_anew_warns_and_shows_its_own_pages(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    code = """\
import flower.urls as u
is_metrics = lambda each: isinstance(each, tuple) and each[0] == "/metrics"
u.handlers[:] = [each for each in u.handlers if not is_metrics(each)]
"""
    with FlowerProcess(server.url, folders=[_patched(tmp_path, code)]) as flower:
        assert "it has no route to Metrics" in flower.log
        assert flower.get("/broker").status == 200


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--redis-url", "http://:hunter2@h"], "expected one of redis://"),
        (["--redis-url", "redis://h", "--basic-auth", "hunter2"], "expected user:password"),
        (["--redis-url", "redis://h", "--prot=1"], "--prot is no option of Flower"),
        (["--redis-url", "redis://h", "--conf=x.py"], "--conf refused"),
        (["--redis-url", "redis://h", "--max-tasks", "hunter2"], "expected --name=value"),
        ([], "no Redis URL"),
    ],
)
def test_a_bad_option_is_one_line_and_shows_no_password(args: list[str], said: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "flower", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode != 0
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert "hunter2" not in run.stderr


def test_flower_needs_no_engine_and_no_models(server: EmbeddedRedis, tmp_path: Path) -> None:
    heavy = ["onnx", "onnxruntime", "torch", "tensorrt", "pycuda", "pynvml", "rich"]
    code = f"import sys\nsys.modules.update(dict.fromkeys({heavy!r}))\n"  # None: not importable
    with FlowerProcess(server.url, folders=[_patched(tmp_path, code)]) as flower:
        assert flower.get("/broker").status == 200
        assert "warning" not in flower.log.lower()


def test_flower_finds_its_redis_through_sentinels(
    server: EmbeddedRedis, store: redis_py.Redis, redis_kind: str, tmp_path: Path
) -> None:
    port = free_port()
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {server.port} 1\n"
    )
    enqueue(store, "m", [0, 9])
    with (tmp_path / "log").open("wb") as log:
        command = [str(find_server(redis_kind)), str(configuration), "--sentinel"]
        sentinel = start_child(command, log)
    try:
        # The first Sentinel is gone; another knows the master.
        url = f"sentinel://127.0.0.1:1/0;sentinel://127.0.0.1:{port}/0"
        with FlowerProcess(url, env={"INFERQ_SENTINEL_MASTER": "main"}) as flower:
            until(lambda: flower.get("/api/queues/length").status == 200)
            assert lengths(flower)["inferq.m"]["messages"] == 2
    finally:
        end_child(sentinel, 10.0)
