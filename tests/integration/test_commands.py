"""What holds of all of inferq's commands: JSON for programs, and a place among Celery's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import msgpack
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.repository import fake_model, message, numbered, push
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.celery_command import inferq as under_celery
from inferq.workers.cli import inferq

NAMES = Names()
ROOT = Path(__file__).parents[2]
#: Those that print no data but what they do; `demo --json` names a file.
NO_DATA = {"worker", "flower", "demo", "redis"}
#: Those whose own tests read their JSON: they take minutes, or packages that may not be here.
READ_ELSEWHERE = {"bench", "build"}

Run = Callable[..., Result]


def _commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, *path, name)
        else:
            yield (*path, name)


def _command(path: tuple[str, ...]) -> click.Command:
    found: click.Command = inferq
    for name in path:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


@pytest.mark.parametrize("path", list(_commands(inferq)), ids=" ".join)
def test_each_command_that_prints_data_prints_json_too(path: tuple[str, ...]) -> None:
    options = {name for each in _command(path).params for name in each.opts}
    assert "--json" in options or path[0] in NO_DATA


def _dead_letter(redis: Redis, request_id: str) -> None:
    _, raw = message("m", numbered(1), request_id)
    letter = {
        "id": request_id,
        "reason": "it was given up",
        "attempts": 3,
        "at_ms": 1.0,
        "worker": "w",
        "size": len(raw),
        "message": raw,
    }
    redis.lpush(NAMES.dead("m"), msgpack.packb(letter))


@pytest.fixture
def run(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("queues", "--json")``"""
    monkeypatch.setenv("INFERQ_REDIS_URL", redis_url)
    return lambda *args: CliRunner().invoke(inferq, list(map(str, args)))


def _told(result: Result, status: int = 0) -> Any:
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_what_each_prints_is_one_json_document(
    redis: Redis, redis_url: str, run: Run, tmp_path: Path
) -> None:
    models, beat = tmp_path / "models", tmp_path / "beat.json"
    fake_model(models, "m", knobs="warm_up = false")
    for letter in ("one", "two", "three"):
        _dead_letter(redis, letter)
    np.savez(tmp_path / "x.npz", x=numbered(7))
    tried: set[tuple[str, ...]] = set()

    def told(*args: object, path: tuple[str, ...]) -> Any:
        tried.add(path)
        return _told(run(*path, *args, "--json"))

    with Worker(redis_url, models, env={"INFERQ_HEARTBEAT_FILE": str(beat)}):
        result = told("m", tmp_path / "x.npz", path=("infer",))
        assert result["outputs"]["x"]["data"] == [[7.0] * 4]
        alone = told(models / "m", tmp_path / "x.npz", path=("run",))
        assert alone["outputs"] == result["outputs"]
        healthy = partial(run, "health", "--file", beat)
        until(lambda: healthy().exit_code == 0, what="its heartbeat says that it serves")
        (health,) = told("--file", beat, path=("health",))
        assert (health["healthy"], health["problem"]) == (True, None)
        (queue,) = told(path=("queues",))["models"]
        assert (queue["model"], queue["dead"], queue["consumers"]) == ("m", 3, 1)
        findings = told("--models", models, path=("doctor",))
        assert {"check", "level", "found", "todo"} == set(findings[0])
        (model,) = told(models, path=("models",))
        assert (model["name"], model["problem"]) == ("m", None)
        letters = told(path=("dead", "list"))
        assert {letter["id"] for letter in letters} == {"one", "two", "three"}
        (letter,) = told("one", path=("dead", "show"))
        assert letter["id"] == "one"
        (replayed,) = told("one", path=("dead", "replay"))
        assert replayed == {
            "model": "m",
            "id": "one",
            "queue": "inferq.m",
            "priority": 0,
            "dropped": [],
        }
        dropped = told("--all", "--model", "m", "--yes", path=("dead", "drop"))
        assert sorted(each["id"] for each in dropped) == ["three", "two"]
    read = {path for path in _commands(inferq) if path[0] not in NO_DATA | READ_ELSEWHERE}
    assert tried == read


def test_the_docs_tell_each_shape() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    told = {path for path in _commands(inferq) if path[0] not in NO_DATA | {"bench"}}
    assert [path for path in told if f"| `inferq {' '.join(path)}` |" not in text] == []


def test_errors_are_one_line_on_stderr_and_status_1(run: Run, tmp_path: Path) -> None:
    for args in (
        ["queues", "--redis-url", "redis://127.0.0.1:1/0"],
        ["dead", "list", "--redis-url", "redis://127.0.0.1:1/0"],
        ["dead", "show", "nobody"],
        ["infer", "nobody", tmp_path / "none.npz"],
        ["health", "--file", tmp_path / "none.json"],
        ["models", tmp_path / "none"],
    ):
        done = run(*args, "--json")
        assert done.exit_code == 1, args
        if args[0] == "health":  # a worker that is none is an answer
            assert json.loads(done.stdout)[0]["healthy"] is False
            continue
        assert done.stdout == ""
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1


def test_dead_letters_that_cannot_be_replayed_are_told_beside_those_that_were(
    redis: Redis, run: Run
) -> None:
    _dead_letter(redis, "good")
    redis.lpush(NAMES.dead("m"), b"garbage")
    done = run("dead", "replay", "--all", "--model", "m", "--yes", "--json")
    assert [each["id"] for each in _told(done, status=1)] == ["good"]
    assert done.stderr.startswith("Error: ")


def test_models_tells_signatures_knobs_and_what_is_wrong(run: Run, tmp_path: Path) -> None:
    fake_model(tmp_path, "good", knobs="lanes = 3\nmax_batch_size = 8", fake="delay_ms = 5")
    fake_model(tmp_path, "wrong", knobs="lane = 3")
    done = run("models", tmp_path, "--json")
    good, wrong = _told(done, status=1)
    assert good["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["batch", 4], "batch_axis": 0}
    ]
    assert (good["engine"], good["version"], good["versions"]) == ("fake", 1, [1])
    assert (good["batchable"], good["max_batch_size"], good["knobs"]["lanes"]) == (True, 8, 3)
    assert good["engine_table"]["delay_ms"] == 5
    assert wrong["name"] == "wrong"
    assert "lane is not a known key" in wrong["problem"]
    assert "lane is not a known key" in done.stderr


# --- celery inferq -------------------------------------------------------------------------------


def _entry_point() -> EntryPoint:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (declared,) = project["entry-points"]["celery.commands"].items()
    name, value = declared
    return EntryPoint(name=name, value=value, group="celery.commands")


@pytest.fixture
def celery(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``celery("-A", "proj", "inferq", "queues", NAME="value")`` with our entry point installed."""
    point = _entry_point()
    site = tmp_path / "site"
    info = site / "entry_point_of_inferq-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-point-of-inferq\nVersion: 1")
    (info / "entry_points.txt").write_text(f"[{point.group}]\n{point.name} = {point.value}\n")

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(site), *filter(None, sys.path)])
        return subprocess.run(
            [sys.executable, "-m", "celery", *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_the_entry_point_is_what_celery_takes() -> None:
    point = _entry_point()
    assert point.name == "inferq"
    assert point.load() is under_celery
    context = click.Context(under_celery)
    assert under_celery.list_commands(context) == inferq.list_commands(context)


def test_celery_inferq_asks_the_apps_redis(
    celery: Callable[..., subprocess.CompletedProcess[str]],
    redis: Redis,
    redis_url: str,
    tmp_path: Path,
) -> None:
    push(redis, "m", [1, 2, 3])
    (tmp_path / "proj.py").write_text(f"import celery\napp = celery.Celery(broker={redis_url!r})\n")
    done = celery("-A", "proj", "inferq", "queues", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"][0]["depth"] == 3
    ours = celery("-A", "inferq.workers.app", "inferq", "queues", INFERQ_REDIS_URL=redis_url)
    assert ours.stdout.split()[:1] == ["model"], ours.stderr
    away = "redis://127.0.0.1:1/0"
    for others in (["--redis-url", away], []):
        env = {} if others else {"INFERQ_REDIS_URL": away}
        done = celery("-A", "proj", "inferq", "queues", *others, **env)
        assert done.returncode == 1, "what is given wins over the app"
        assert "127.0.0.1:1" in done.stderr


def test_celery_inferq_finds_the_keys_that_the_app_prefixes(
    celery: Callable[..., subprocess.CompletedProcess[str]],
    redis: Redis,
    redis_url: str,
    tmp_path: Path,
) -> None:
    names = Names(prefix="mine.", sep=":", priority_steps=(0, 5))
    redis.lpush(names.queue("m", 5), message("m", numbered(1))[1])
    transport = {"global_keyprefix": "mine.", "sep": ":", "priority_steps": [0, 5]}
    (tmp_path / "proj.py").write_text(
        f"import celery\napp = celery.Celery(broker={redis_url!r})\n"
        f"app.conf.broker_transport_options = {transport!r}\n"
    )
    for env in ({}, {"CELERY_BROKER_URL": redis_url}):
        done = celery("-A", "proj", "inferq", "queues", "m", "--json", **env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["models"][0]["by_priority"] == {"0": 0, "5": 1}


def test_celery_inferq_without_an_app_says_what_it_lacks(
    celery: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = celery("inferq", "queues")
    assert done.returncode == 1
    assert "no Redis URL" in done.stderr
    assert celery("inferq", "--help").stdout.count("Show what waits of each MODEL") == 1


def test_celery_starts_no_slower_for_it() -> None:
    """Every celery command imports the entry point."""
    code = (
        "import celery.bin.celery, sys; before = set(sys.modules); "
        "import inferq.workers.celery_command; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    brought = done.stdout.split()
    assert {name for name in brought if not name.startswith("inferq")} == set()
