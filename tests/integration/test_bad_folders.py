"""One bad folder of a repository harms no other model, and whoever looks is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from click.testing import CliRunner, Result
from helpers.bad_models import (
    BAD,
    FOUND_LATE,
    MISNAMED,
    NEWEST,
    OTHERS,
    file,
    good,
    write_all,
    write_others,
)
from helpers.flower import FlowerProcess
from helpers.metrics import metrics_url, scrape
from helpers.repository import message, numbered
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from kombu import pools

from inferq.producer import Client
from inferq.shared.names import Names, queue_of
from inferq.workers.cli import inferq
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
TIMEOUT_S = 30
#: What the worker serves, and in which version, though 2 is there of some.
SERVED = {"good": 1, **dict.fromkeys(NEWEST, 1)}


class Everything(SupervisedWorker):
    """``inferq worker`` without -Q; `serve` is only what is waited for."""

    def _command(self) -> list[str]:
        command = super()._command()
        place = command.index("-Q")
        return command[:place] + command[place + 2 :]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_all(root)
    return root


@pytest.fixture(scope="module")
def server(redis_kind: str) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(redis_kind) as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, models: Path) -> Iterator[SupervisedWorker]:
    """One that serves whatever of the repository can be served."""
    env = {"INFERQ_METRICS": "127.0.0.1:0"}
    with Everything(server.url, models, sorted(SERVED), env=env) as worker:
        yield worker


@pytest.fixture
def url(server: EmbeddedRedis) -> str:
    """That of the worker's Redis; `redis_url` is another."""
    return server.url


@pytest.fixture
def store(url: str) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(url, socket_timeout=10.0) as client:
        yield client


def line_about(log: str, *parts: str) -> str:
    """The line of `log` that says all `parts`, and loudly."""
    found = [line for line in log.splitlines() if all(part in line for part in parts)]
    assert found, f"no line says {parts}:\n{log[-6000:]}"
    assert any(level in found[0] for level in ("ERROR", "CRITICAL")), found[0]
    return found[0]


def test_every_good_model_is_served_in_its_newest_complete_version(
    worker: SupervisedWorker, url: str
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Client(url) as client:
        for model, version in SERVED.items():
            result = client.infer(model, {"x": x}, timeout=TIMEOUT_S)
            np.testing.assert_array_equal(result.outputs["y"], 2 * x)
            assert result.receipt is not None
            assert result.receipt.version == version


def test_the_log_names_each_bad_model_with_its_reason(worker: SupervisedWorker) -> None:
    for name, bad in BAD.items():
        line_about(worker.log, f"{name!r} is not served", bad.reason)
    for name, bad in NEWEST.items():
        line_about(worker.log, f"{name!r}", "version 2 is passed over", bad.reason)
    (passed_over,) = (line for line in worker.log.splitlines() if "hold no model" in line)
    assert ", ".join(OTHERS) in passed_over
    assert "INFO" in passed_over


def test_inferq_models_lists_the_good_and_the_bad_and_fails(models: Path) -> None:
    shown = CliRunner().invoke(inferq, ["models", str(models)])
    assert shown.exit_code == 1
    for name, bad in BAD.items():
        if name not in FOUND_LATE:
            assert any(name in line and bad.reason in line for line in shown.stderr.splitlines())
    for name, bad in NEWEST.items():
        assert any(
            f"{name} version 2" in line and bad.reason in line for line in shown.stderr.splitlines()
        )
    assert f"passed over: .hidden, README.md, {', '.join(OTHERS)}" in shown.stdout
    told = {
        each["name"]: each
        for each in json.loads(CliRunner().invoke(inferq, ["models", str(models), "--json"]).stdout)
    }
    assert set(told) == {*SERVED, *BAD}
    assert {name for name, each in told.items() if each["problem"]} == set(BAD) - FOUND_LATE
    for name, version in SERVED.items():
        assert told[name]["version"] == version
    for name, bad in NEWEST.items():
        ((newest, reason),) = ((e["version"], e["reason"]) for e in told[name]["passed_over"])
        assert newest == 2
        assert bad.reason in reason


def test_inferq_doctor_names_each_with_what_to_do(
    worker: SupervisedWorker, url: str, models: Path
) -> None:
    def look() -> dict[str, Any] | None:
        options = ["doctor", "--redis-url", url, "--models", str(models), "--json"]
        told = json.loads(CliRunner().invoke(inferq, options).stdout)
        found = {each["check"]: each for each in told}
        found["worker"] = next((e for c, e in found.items() if c.startswith("worker test@")), None)
        return found if found["worker"] is not None else None

    found = until(look, 60, "the worker answers")
    assert found is not None
    for name, bad in BAD.items():
        if name not in FOUND_LATE:
            assert found[f"model {name}"]["level"] == "error"
            assert bad.reason in found[f"model {name}"]["found"]
            assert found[f"model {name}"]["todo"]
    for name, bad in NEWEST.items():
        assert found[f"model {name}"]["level"] == "warning"
        assert bad.reason in found[f"model {name}"]["found"]
        assert "version 1" in found[f"model {name}"]["found"]
    assert "git lfs pull" in found["model pointer"]["found"]
    assert found["model good"]["level"] == "ok"
    assert found["models"]["level"] == "ok"
    assert ", ".join(OTHERS) in found["models"]["found"]
    assert found["worker"]["level"] == "warning"
    for name in (*BAD, *NEWEST):
        assert name in found["worker"]["found"]
    assert "zeros" in found["worker"]["found"]
    assert "start the worker again" in found["worker"]["todo"]


def test_the_worker_is_healthy_and_says_what_it_does_not_serve(worker: SupervisedWorker) -> None:
    asked = ["health", "--file", str(worker.heartbeat)]

    def healthy() -> Result | None:
        """It loads, until its next heartbeat."""
        shown = CliRunner().invoke(inferq, asked)
        return shown if shown.exit_code == 0 else None

    shown = until(healthy, 30, "its heartbeat says that it serves")
    assert shown is not None
    assert ": ok (" in shown.stdout
    assert "not served: " in shown.stdout
    for name in BAD:
        assert name in shown.stdout
    (told,) = json.loads(CliRunner().invoke(inferq, [*asked, "--json"]).stdout)
    assert told["healthy"] is True
    assert {each["model"] for each in told["not_served"] if each["version"] is None} == set(BAD)


def test_flowers_page_and_inspect_stats_name_each(worker: SupervisedWorker, url: str) -> None:
    with FlowerProcess(url) as flower:

        def told() -> dict[str, Any] | None:
            page: dict[str, Any] = flower.get("/inference/data").json()
            return page if page["not_served"] else None

        page = until(told, 30, "the page has the worker's stats")
        assert page is not None
    by_name = {(each["model"], each["version"]): each for each in page["not_served"]}
    assert set(by_name) == {(name, None) for name in BAD} | {(name, 2) for name in NEWEST}
    for name, bad in BAD.items():
        assert bad.reason in by_name[name, None]["reason"]
        assert [node.partition("@")[0] for node in by_name[name, None]["nodes"]] == ["test"]
    (note,) = (note for note in page["notes"] if "no model" in note)
    assert ", ".join(OTHERS) in note
    with stock_app(url) as app:
        stats = until(lambda: app.control.inspect(timeout=2, limit=1).stats(), 30, "it answers")
        ((_, info),) = stats.items()
    for name, bad in {**BAD, **NEWEST}.items():
        assert name in info["inferq_not_served"]
        assert bad.reason in info["inferq_not_served"]


def test_prometheus_is_told_of_each(worker: SupervisedWorker) -> None:
    family = scrape(metrics_url(worker)).families["inferq_model_not_served"]
    told = {(each.labels["model"], each.labels["version"]): each.value for each in family.samples}
    assert told == {
        **{(name, ""): 1 for name in BAD},
        **{(name, "2"): 1 for name in NEWEST},
    }


def test_what_is_sent_to_a_model_that_is_not_served_waits(
    worker: SupervisedWorker, url: str, store: redis_py.Redis
) -> None:
    """Also a foreign task, and also once Celery's own side has connected anew."""
    waiting = sorted(BAD.keys() - MISNAMED)
    with stock_app(url) as app:
        for model in waiting:
            store.lpush(NAMES.queue(model), message(model, numbered(1))[1])
            app.send_task("somebody.elses", queue=queue_of(model))
    connected = worker.log.count("Connected to redis")
    store.client_kill_filter(_type="normal", skipme=True)
    store.client_kill_filter(_type="pubsub")
    pools.reset()  # kombu's pools of this process hold dead ones, too
    until(lambda: worker.log.count("Connected to redis") > connected, 60, "Celery's side is back")
    with stock_app(url) as app, Client(url) as client:
        until(lambda: app.control.inspect(timeout=2, limit=1).ping(), 60, "its consumer listens")
        # Served after the new connections are there: so both sides take again what they take.
        for _ in range(20):
            client.infer("good", {"x": np.ones((1, 3), np.float32)}, timeout=TIMEOUT_S)
    assert {m: store.llen(NAMES.queue(m)) for m in waiting} == dict.fromkeys(waiting, 2)
    assert store.hlen("unacked") == 0
    asked = ["queues", "--redis-url", url, "--json"]
    told = json.loads(CliRunner().invoke(inferq, asked).stdout)["models"]
    consumers = {each["model"]: each["consumers"] for each in told}
    assert {model: consumers[model] for model in waiting} == dict.fromkeys(waiting, 0)
    assert consumers["good"] == 1


# --- what the command line asks for --------------------------------------------------------------


def test_a_worker_that_was_told_of_a_bad_queue_serves_the_others(
    redis_url: str, tmp_path: Path
) -> None:
    for model in ("good", "other"):
        good(tmp_path, model)
    for model in ("broken", "zeros"):
        BAD[model].write(tmp_path, model)
    bad = ["broken", "none", "zeros"]
    with (
        Worker(redis_url, tmp_path, ["good", "other"], bad=bad) as worker,
        Client(redis_url) as client,
    ):
        for model in ("good", "other"):
            client.infer(model, {"x": np.ones((1, 3), np.float32)}, timeout=TIMEOUT_S)
        line_about(worker.log, "'broken' is not served")
        line_about(worker.log, "'none' is not served", "no folder")
        line_about(worker.log, "'zeros' is not served")
        assert worker.stop() == 0


def run_worker(redis_url: str, root: Path, *options: str, env: dict[str, str] | None = None) -> Any:
    """``inferq worker`` to its end."""
    command = [sys.executable, "-m", "inferq.workers.cli", "worker", "--models", str(root)]
    return subprocess.run(
        [*command, "--redis-url", redis_url, *options],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})},
    )


STRICT = {name: BAD[name] for name in ("broken", "empty-version", "my model", "zeros", "pointer")}


@pytest.mark.parametrize("name", [*STRICT, *list(NEWEST)[:2], "docs"])
def test_strict_refuses_whatever_cannot_be_served(
    redis_url: str, tmp_path: Path, name: str
) -> None:
    good(tmp_path, "good")
    if name == "docs":
        write_others(tmp_path)
    elif name in NEWEST:
        good(tmp_path, name)
        NEWEST[name].write(tmp_path, name)
    else:
        BAD[name].write(tmp_path, name)
    done = run_worker(redis_url, tmp_path, "--strict")
    assert done.returncode not in (0, None)
    said = done.stdout + done.stderr
    assert name in said
    assert ({**BAD, **NEWEST}[name].reason if name != "docs" else "no model in") in said
    assert "serving good" not in said


def test_strict_is_a_setting_too_and_minds_only_what_was_asked_for(
    redis_url: str, tmp_path: Path
) -> None:
    good(tmp_path, "good")
    BAD["broken"].write(tmp_path, "broken")
    refused = Worker(redis_url, tmp_path, ["good", "broken"], env={"INFERQ_STRICT": "1"})
    try:
        refused.start()
        assert refused.process.wait(60) not in (0, None)
        assert "is no whole ONNX file" in refused.log
    finally:
        refused.close()
    with Worker(redis_url, tmp_path, ["good"], env={"INFERQ_STRICT": "1"}) as worker:
        assert worker.stop() == 0


def test_a_worker_of_which_no_model_can_be_served_ends_with_the_reasons(
    redis_url: str, tmp_path: Path
) -> None:
    for name in ("broken", "toml"):
        BAD[name].write(tmp_path, name)
    done = run_worker(redis_url, tmp_path)
    assert done.returncode not in (0, None)
    for name in ("broken", "toml"):
        assert BAD[name].reason in done.stderr
    late = tmp_path / "late"
    for name in ("a", "b"):
        BAD["zeros"].write(late, name)
    done = run_worker(redis_url, late)
    assert done.returncode == 78
    for name in ("a", "b"):
        assert str(file(late, name)) in done.stderr
