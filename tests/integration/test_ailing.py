"""A worker that serves and yet has ceased to do some part of its work is no healthy worker."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import helpers.ailing
import msgspec
import pytest
from helpers.repository import fake_model, message, numbered
from helpers.results import NAMES, dead_letters, meta_of, nothing_is_held
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.shared.celery_app import make_app
from inferq.shared.settings import Settings
from inferq.workers.supervision import health
from inferq.workers.supervision.health import problem_of, read_beat

STUCK_S = 2.0
LOOPS = ("canvas", "events", "later", "lease", "metrics", "recovery", "stats")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs="lanes = 1\nwarm_up = false")
    return root


def ailing(what: str, tmp_path: Path) -> Mapping[str, str]:
    """The environment of workers of which the first has this."""
    hook = str(Path(helpers.ailing.__path__[0]))
    return {
        "PYTHONPATH": os.pathsep.join([hook, *filter(None, sys.path)]),
        "INFERQ_TEST_AILS": what,
        "INFERQ_TEST_AILS_AT": str(tmp_path / "ails"),
        "INFERQ_TEST_STUCK_S": str(STUCK_S),
    }


def push(redis: Redis) -> str:
    request_id, raw = message("m", numbered(1))
    redis.lpush(NAMES.queue("m"), raw)
    return request_id


def push_linked(redis_url: str, queue: str = "elsewhere") -> str:
    """A request with a link."""
    app = make_app(Settings.load(redis_url=redis_url))
    link = app.signature("other.task", queue=queue)
    inputs = {"x": [[1.0, 2.0, 3.0, 4.0]]}
    sent = app.send_task("inferq.infer", kwargs={"inputs": inputs}, queue="inferq.m", link=link)
    app.close()
    return str(sent.id)


@pytest.mark.parametrize("name", LOOPS)
def test_a_background_loop_that_has_ended_fails_the_health_check(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, name: str
) -> None:
    beat = tmp_path / "beat.json"
    env = {
        **ailing(name, tmp_path),
        "INFERQ_HEARTBEAT_FILE": str(beat),
        "INFERQ_METRICS": "127.0.0.1:0",
    }
    with Worker(redis_url, models, env=env, args=["-E"]) as worker:
        push_linked(redis_url)  # or some have nothing to do for long

        def problem() -> str:
            found = read_beat(beat)
            return (problem_of(found) or "") if found is not None else ""

        until(lambda: f"its background loop {name} has ended" in problem(), what="it is told")
        assert worker.alive
        worker.kill()  # what its loop leaves undone would hold it up as long as its grace lasts


def test_the_endpoint_tells_of_a_loop_that_has_ended(
    redis_url: str, models: Path, tmp_path: Path
) -> None:
    env = {**ailing("later", tmp_path), "INFERQ_METRICS": "127.0.0.1:0"}
    with Worker(redis_url, models, env=env) as worker:
        until(lambda: "metrics at " in worker.log, what="the endpoint is there")
        line = next(line for line in worker.log.splitlines() if "metrics at " in line)
        url = line.partition("metrics at ")[2].replace("/metrics", "/healthz")

        def told() -> str:
            try:
                return str(urllib.request.urlopen(url, timeout=10).read(), "utf-8")
            except urllib.error.HTTPError as answer:
                return str(answer.read(), "utf-8")

        until(lambda: "background loop later has ended" in told(), what="it is told")


@pytest.mark.parametrize("what", ["recovery", "later:hangs"])
def test_a_child_whose_background_loop_ends_or_hangs_is_replaced(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, what: str
) -> None:
    with SupervisedWorker(redis_url, models, env=dict(ailing(what, tmp_path))) as worker:
        name = what.partition(":")[0]
        until(lambda: f"is killed: its background loop {name} " in worker.log, 30.0, "it is killed")
        until(lambda: worker.log.count(" serves, ") >= 2, 30.0, "the next one serves")
        request_id = push(redis)
        until(lambda: redis.exists(NAMES.meta(request_id)), what="it answers")


def test_a_child_whose_links_are_never_published_is_replaced_and_they_are(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    """Requests without links go on meanwhile: nothing else tells that it is stuck."""
    with SupervisedWorker(redis_url, models, env=dict(ailing("links", tmp_path))) as worker:
        request_id = push_linked(redis_url)
        until(lambda: "links of a request have waited" in worker.log, 30.0, "it is killed")
        until(lambda: redis.exists(NAMES.meta(request_id)), 30.0, "the next one publishes them")
        assert redis.llen("elsewhere") == 1
        assert "is killed: links of a request have waited to be published for" in worker.log


def test_links_that_have_their_worker_killed_again_and_again_end_as_a_dead_letter(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    """What waits behind them is not to blame, and is published."""
    env = dict(ailing("hanging links", tmp_path))
    with SupervisedWorker(redis_url, models, env=env) as worker:
        culprit = push_linked(redis_url, "hangs")
        until(lambda: redis.exists(f"inferq:1:running:{worker.incarnation}"), what="it is noted")
        innocent = push_linked(redis_url)
        result = meta_of(redis, culprit, 60.0)["result"]
        assert result["exc_type"] == "DeadLettered"
        reason = "its worker died publishing what follows on it 3 times"
        assert reason in result["exc_message"][0]
        assert meta_of(redis, innocent, 30.0)["status"] == "SUCCESS"
        assert redis.llen("elsewhere") == 1
        assert [letter["reason"] for letter in dead_letters(redis, "m")] == [reason]
        assert not redis.exists("hangs", NAMES.attempts("m"))
        assert worker.log.count("is killed: links of a request") == 3
        until(lambda: nothing_is_held(redis), what="nothing is held any more")


def test_links_and_loops_are_named_as_problems() -> None:
    good = health.Beat(
        pid=os.getpid(),
        node="n",
        state=health.SERVING,
        written=1e12,
        answered=1e12,
        computing=0,
        waiting=0,
        overdue=False,
        stuck_s=0.0,
    )
    assert health.stuck(good) is None
    given = {"loops": {"later": "has ended", "lease": "has not got on for 61 s"}}
    assert health.stuck(msgspec.structs.replace(good, **given)) == (
        "its background loop later has ended; its background loop lease has not got on for 61 s"
    )
    waits = msgspec.structs.replace(good, links_s=health.STUCK_S + 1)
    assert "links of a request have waited to be published for 31 s" in str(health.stuck(waits))
    few = msgspec.structs.replace(good, links_s=health.STUCK_S - 1)
    assert health.stuck(few) is None
