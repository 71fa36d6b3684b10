"""What a model's files, Redis or a message hold does not steer the terminal of who looks at it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers import onnx_models
from helpers.onnx_models import FLOAT, node
from helpers.worker import SupervisedWorker
from redis import Redis

import inferq.workers
from inferq.producer import Client, InferqError
from inferq.shared.names import Names
from inferq.workers.models.array_files import write_npz
from inferq.workers.models.not_served import NotServed
from inferq.workers.supervision.health import SERVING, Beat

NAMES = Names()
#: Sets a terminal's title, moves its cursor, begins a line, is taken for CSI, turns text around.
ESCAPES = "\x1b]0;owned\x07\x1b[2A\r\x9b31m\u202e"
X, Y, DIM = f"x{ESCAPES}", f"y{ESCAPES}", f"batch{ESCAPES}"
#: What may stand in a command's output besides text.
ALLOWED = {"\n"}


def strange(text: str) -> set[str]:
    return {char for char in text if not char.isprintable()} - ALLOWED


Run = Callable[..., str]


@pytest.fixture
def run(redis_url: str, tmp_path: Path) -> Run:
    """``run("queues")`` → all that the command has printed."""

    def run(*args: str | Path, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "inferq.workers.cli", *map(str, args)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "INFERQ_REDIS_URL": redis_url,
                "TMPDIR": str(tmp_path),
                **env,
            },
            capture_output=True,
            timeout=120,
            check=False,
        )
        said = (done.stdout + done.stderr).decode()
        assert said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """One good model, and folders of which each has an escape code somewhere else."""
    root = tmp_path / "models"
    shape = (DIM, 2)
    onnx_models.write(
        root / "good" / "1" / "model.onnx",
        [node("Add", [X, X], [Y])],
        {X: (FLOAT, shape)},
        {Y: (FLOAT, shape)},
    )
    (root / "good" / "model.toml").write_text('labels = ["\\u001b[2Jcat", "dog"]\n')
    (root / "good" / "2" / f"part{ESCAPES}").mkdir(parents=True)
    for name, toml in {
        "key": '"\\u001b[31mlane" = 3\n',
        "value": 'on_mismatch = "\\u001b[31m"\n',
        "engine": 'engine = "\\u009b31m"\n',
    }.items():
        onnx_models.double(root / name / "1" / "model.onnx")
        (root / name / "model.toml").write_text(toml)
    onnx_models.double(root / f"model{ESCAPES}" / "1" / "model.onnx")
    (root / f"notes{ESCAPES}").mkdir()
    return root


def test_models_doctor_and_build(run: Run, models: Path) -> None:
    for said in (
        run("models", models),
        run("doctor", "--models", models),
        run("build", "good", "--models", models, "--plans", models.parent / "plans"),
        run("build", f"good{ESCAPES}", "--models", models, "--plans", models.parent / "plans"),
    ):
        assert strange(said) == set()
    assert "\\x1b" in run("models", models), "they are shown all the same"


def test_a_table_on_a_terminal(models: Path, redis_url: str) -> None:
    reading, writing = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "inferq.workers.cli", "models", models],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"},
        stdout=writing,
        stderr=writing,
        stdin=subprocess.DEVNULL,
    )
    os.close(writing)
    said = b"".join(iter(lambda: _read(reading), b"")).decode()
    os.close(reading)
    process.wait(60)
    assert "good" in said
    # Bold and colour are the table's own.
    assert strange(re.sub(r"\x1b\[[0-9;]*m|\r\n", "", said)) == set()
    assert "\x1b[31m" not in said
    assert "\x1b[2J" not in said


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has it open any more
        return b""


def test_health(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / f"inferq-{os.geteuid()}"
    folder.mkdir(mode=0o700)
    now = time.monotonic()
    for name, loops in (("one", {}), ("two", {ESCAPES: "has ended"})):
        beat = Beat(
            os.getpid(),
            f"node{ESCAPES}",
            SERVING,
            now + 60,
            now + 60,
            0,
            0,
            False,
            0.0,
            not_served=(NotServed(f"m{ESCAPES}", f"why{ESCAPES}"),),
            loops=loops,
        )
        (folder / f"{name}{ESCAPES}.json").write_bytes(msgspec.json.encode(beat))
    (folder / f"bad{ESCAPES}.json").write_text("{")
    for args in ((), ("--json",)):
        assert strange(run("health", *args)) == set()


@pytest.fixture
def served(redis_url: str, models: Path) -> Iterator[SupervisedWorker]:
    with SupervisedWorker(redis_url, models, ["good"]) as worker:
        yield worker


def test_what_clients_of_a_model_see_and_what_its_worker_logs(
    run: Run, served: SupervisedWorker, redis_url: str, tmp_path: Path
) -> None:
    write_npz(tmp_path / "good.npz", {X: np.ones((1, 2), np.float32)})
    write_npz(tmp_path / "bad.npz", {f"z{ESCAPES}": np.ones((1, 2), np.float32)})
    with Client(redis_url) as client, pytest.raises(InferqError):
        client.infer("good", {X: np.ones((1, 9), np.float32)}, timeout=60)
    for said in (
        run("infer", "good", tmp_path / "good.npz"),
        run("infer", "good", tmp_path / "bad.npz"),
        run("infer", "good", tmp_path / "good.npz", "--json"),
        run("infer", f"no{ESCAPES}", tmp_path / "good.npz"),
        run("bench", "good", "--concurrency", "1", "--window", "0.2", "--max-windows", "3"),
        run("queues"),
        run("queues", f"no{ESCAPES}"),
        run("doctor", "--models", "."),
        served.log,
    ):
        assert strange(said) == set()


def test_queues_and_dead_letters_of_whoever_may_write_redis(run: Run, redis: Redis) -> None:
    hostile = ESCAPES.encode()
    redis.lpush(NAMES.queue("m"), hostile)
    redis.lpush(NAMES.dead("m"), hostile)
    redis.set(NAMES.scheduled, hostile)
    redis.zadd(NAMES.serving("m"), {hostile: 1})
    for args in (
        ("queues",),
        ("dead", "list"),
        ("dead", "show", ESCAPES),
        ("doctor",),
        ("health",),
        ("dead", "show", ESCAPES, "--json"),
        ("dead", "replay", ESCAPES),
        ("dead", "drop", ESCAPES),
    ):
        assert strange(run(*args)) == set(), args


def test_commands_print_by_what_keeps_text_plain_alone() -> None:
    """Who adds a command need not think of it; JSON is ASCII."""
    (root,) = map(Path, inferq.workers.__path__)
    found = [
        f"{path.relative_to(root)}:{call.lineno}"
        for path in root.rglob("*.py")
        if path.name != "printing.py"
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {"click.echo", "print"}
    ]
    assert found == []
