"""What real workers write to stderr: JSON lines if asked for, with the ids of whom they concern."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.repository import fake_model, message, numbered
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.errors import EngineError
from inferq.shared.names import Names
from inferq.workers.engines.fake import FAULT_RAISE
from inferq.workers.logs.flood import BURST

QUEUE = Names().queue("m")
#: Another task: nobody here knows it.
FOREIGN = {
    "body": "W10=",
    "content-type": "application/json",
    "content-encoding": "utf-8",
    "headers": {"id": "foreign", "task": "unheard.of"},
    "properties": {
        "delivery_tag": "tag",
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": "inferq.m"},
    },
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    knobs = "lanes = 1\nmax_batch_size = 8\nwarm_up = false"
    fake_model(root, "m", knobs=knobs, fake="faults = true")
    return root


def lines(worker: Worker) -> list[dict[str, Any]]:
    """All lines so far, each a JSON object."""
    found = []
    for line in worker.log.splitlines():
        each = json.loads(line)
        assert {"time", "level", "logger", "message", "node"} <= set(each)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["time"])
        found.append(each)
    return found


def _with(worker: Worker, text: str) -> list[dict[str, Any]]:
    return [each for each in lines(worker) if text in each["message"]]


@pytest.mark.parametrize("kind", [Worker, SupervisedWorker])
def test_every_line_of_a_worker_and_its_supervisor_is_a_json_object(
    kind: type[Worker], redis_url: str, redis: Redis, models: Path
) -> None:
    how: dict[str, Any] = {"env": {"INFERQ_LOG_FORMAT": "json"}}
    if kind is SupervisedWorker:
        how = {"args": ["--log-format", "json"]}
    with kind(redis_url, models, **how) as worker:
        redis.lpush(QUEUE, json.dumps(FOREIGN), b"garbage")
        bad, raw = message("m", numbered(FAULT_RAISE))
        redis.lpush(QUEUE, raw, *(message("m", numbered(n))[1] for n in range(7)))
        until(lambda: _with(worker, "is not run"), what="the other task is told of")
        until(lambda: _with(worker, "the engine raised"), what="the engine raised")
        (raised,) = _with(worker, "the engine raised")
        (quarantined,) = _with(worker, "quarantined a message of m")
        worker.stop()
        told = lines(worker)
    node = {each["node"] for each in told}
    assert (raised["level"], raised["model"], raised["request_ids"]) == ("ERROR", "m", [bad])
    assert raised["exception"].startswith("Traceback (most recent call last):\n")
    assert raised["exception"].count("Traceback") == 1
    assert quarantined["model"] == "m"
    assert len(node - {"supervisor"}) == 1
    loggers = {each["logger"] for each in told}
    assert {"celery.apps.worker", "inferq.workers.control_plane.service"} <= loggers
    assert ("inferq.workers.supervision.supervisor" in loggers) == (kind is SupervisedWorker)
    assert any("Warm shutdown" in each["message"] for each in told)


def test_one_line_a_batch_at_debug_and_none_a_request_at_info(redis_url: str, models: Path) -> None:
    env = {"INFERQ_LOG_FORMAT": "json"}
    for level in ("DEBUG", "INFO"):
        with Worker(redis_url, models, env=env, args=["--loglevel", level]) as worker:
            with Client(redis_url) as client:
                done = list(client.map("m", [{"x": numbered(n)} for n in range(40)], in_flight=40))
                ids = {result.request_id for result in done}
            worker.stop()
            about = [each for each in lines(worker) if ids & set(each.get("request_ids", []))]
            batches = _with(worker, "batch of m on lane 0")
        if level == "INFO":
            assert about == batches == []
            continue
        assert {each["level"] for each in about} == {"DEBUG"}
        assert sum(each["requests"] for each in batches) == 40
        assert sum(each["rows"] for each in batches) == 40
        assert {each for batch in batches for each in batch["request_ids"]} == ids
        for batch in batches:
            assert batch["bucket"] == batch["rows"] + batch["padding"]
            assert batch["ms"] > 0


def test_what_was_not_computed_is_told_with_its_id_at_debug(
    redis_url: str, redis: Redis, models: Path
) -> None:
    env = {"INFERQ_LOG_FORMAT": "json"}
    with Worker(redis_url, models, env=env, args=["--loglevel", "DEBUG"]) as worker:
        late, raw = message("m", numbered(1), deadline_ms=1.0)
        wrong, other = message("m", numbered(1, width=5))
        redis.lpush(QUEUE, raw, other)
        failed, third = message("m", numbered(FAULT_RAISE))
        redis.lpush(QUEUE, third)
        until(lambda: _with(worker, "1 failed"), what="the failed one is told")
        named = {tuple(each.get("request_ids", ())): each for each in lines(worker)}
        (batch,) = _with(worker, "1 failed")
    assert late in named[(late,)]["message"]
    assert named[(wrong,)]["error"] == "invalid_input"
    assert batch["failed_ids"] == [failed]


def test_bad_messages_do_not_fill_the_log(redis_url: str, redis: Redis, models: Path) -> None:
    count = 20 * BURST
    with Worker(redis_url, models, env={"INFERQ_LOG_FORMAT": "json"}) as worker:
        raws = [message("m", numbered(FAULT_RAISE))[1] for _ in range(count)]
        redis.lpush(QUEUE, *raws, *(b"garbage %d" % n for n in range(count)))
        redis.lpush(QUEUE, *(json.dumps(FOREIGN) for n in range(count)))
        until(lambda: redis.llen(Names().dead("m")) == count, what="all were quarantined")
        with Client(redis_url) as client, pytest.raises(EngineError):
            client.infer("m", {"x": numbered(FAULT_RAISE)}, timeout=30)
        worker.stop()
        told = lines(worker)
    for text in ("quarantined a message", "the engine raised", "is not run"):
        found = [each for each in told if text in each["message"]]
        assert 0 < len(found) <= 2 * BURST, text


def test_no_client_writes_a_line_of_its_own(redis_url: str, redis: Redis, models: Path) -> None:
    forged = "x\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged \x1b[31m"
    foreign = {**FOREIGN, "headers": {"id": forged, "task": forged}}
    with Worker(redis_url, models, args=["-l", "DEBUG"]) as worker:
        for x, request_id in ((numbered(FAULT_RAISE), "one"), (numbered(0)[None], "two")):
            told = json.loads(message("m", x, request_id)[1])
            told["headers"]["id"] = f"{request_id} {forged}"
            redis.lpush(QUEUE, json.dumps(told))
        redis.lpush(QUEUE, json.dumps(foreign), forged)
        texts = ("raised on one", "refused two", "is not run", "quarantined")
        until(lambda: all(text in worker.log for text in texts), what="all are told of")
        worker.stop()
        assert "] forged" in worker.log
        assert "\n[2026-01-01" not in worker.log
        assert "\x1b" not in worker.log


def test_text_stays_as_celery_formats_it(redis_url: str, models: Path) -> None:
    with Worker(redis_url, models) as worker:
        until(lambda: "ready." in worker.log, what="Celery is up")
        worker.stop()
        assert re.search(r"^\[.*: INFO/MainProcess\] serving m$", worker.log, re.MULTILINE)
        assert ".> transport:" in worker.log


def test_a_refusal_is_one_json_line_too(tmp_path: Path, redis_url: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "inferq.workers.cli", "worker", "--log-format", "json",
            "--models", str(tmp_path), "--redis-url", redis_url,
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert "no model in" in told["message"]
    assert told["level"] == logging.getLevelName(logging.ERROR)


def test_another_format_is_refused_by_name(tmp_path: Path, redis_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "worker", "--log-format", "xml"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'xml' is not one of 'text', 'json'" in done.stderr
