"""A worker process serves on the GPU that it was given, or on the CPU, and tells of it.

NVML is a fake where a test has GPUs, since there is no card; the engines compute on the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery
from helpers import onnx_models
from helpers.gpus import NO_CARD
from helpers.repository import fake_model, numbered
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.names import Names

#: What makes a worker find the fake.
TWO_GPUS = {
    "PYTHONPATH": os.pathsep.join([str(NO_CARD), *(entry for entry in sys.path if entry)]),
    "FAKE_GPUS": "2",
}
UUIDS = [f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in range(2)]


class _OnAllGpus(Worker):
    """``inferq worker --gpu all``."""

    def _command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "inferq.workers.cli",
            "worker",
            "--models",
            str(self.models),
            "--gpu",
            "all",
        ]


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path / "models", "m", knobs="lanes = 1\nwarm_up = false")
    return tmp_path / "models"


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    with stock_app(redis_url) as app:
        yield app


def _stats(app: Celery, workers: int) -> dict[str, Any]:
    """What `celery inspect stats` tells, by node, once so many answer."""

    def ask() -> dict[str, Any]:
        answers = app.control.broadcast("stats", reply=True, limit=workers, timeout=2.0)
        told = {node: answer for each in answers for node, answer in each.items()}
        return told if len(told) == workers else {}

    return until(ask, 30, f"{workers} workers answer")


def _children(pid: int) -> list[dict[str, str]]:
    """The environment that each child of `pid` was started with."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in pids:
        lines = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found.append(dict(line.split("=", 1) for line in lines if line))
    return found


def test_all_gpus_serve_a_process_each(
    redis_url: str, redis: Redis, app: Celery, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    env = {**TWO_GPUS, "TMPDIR": str(tmp_path / "tmp")}
    with _OnAllGpus(redis_url, models, env=env) as worker:
        until(lambda: redis.zcard(Names().serving("m")) == 2, 30, "both serve")
        environments = sorted(_children(worker.pid), key=lambda each: each["INFERQ_GPU"])
        names = ("INFERQ_GPU", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES")
        assert [[each[name] for name in names] for each in environments] == [
            [str(n), "PCI_BUS_ID", UUIDS[n]] for n in range(2)
        ]
        beats = [Path(each["INFERQ_HEARTBEAT_FILE"]) for each in environments]
        until(lambda: all(beat.exists() for beat in beats), what="each has its heartbeat")
        stats = _stats(app, 2)
        assert [node.partition("@")[0] for node in sorted(stats)] == ["gpu0", "gpu1"]
        for n, node in enumerate(sorted(stats)):
            assert stats[node]["inferq_gpu_index"] == n
            assert stats[node]["inferq_gpu_uuid"] == UUIDS[n]
            assert stats[node]["inferq_gpu_memory_total_bytes"] == 80 << 30
            assert stats[node]["inferq_gpu_last_xid"] is None
        with Client(redis_url) as client:
            for n in range(20):
                got = client.infer("m", {"x": numbered(n)}, timeout=30)
                np.testing.assert_array_equal(got.outputs["x"], numbered(n))
        assert worker.stop() == 0
        assert worker.log.count("pinned to GPU ") == 2


def test_a_plain_celery_worker_is_pinned_by_its_environment(
    redis_url: str, app: Celery, models: Path
) -> None:
    with Worker(redis_url, models, env={**TWO_GPUS, "INFERQ_GPU": "1"}) as worker:
        (stats,) = _stats(app, 1).values()
        assert stats["inferq_gpu_uuid"] == UUIDS[1]
        assert "pinned to GPU 1, No Card 1" in worker.log


def _refusal(worker: Worker) -> str:
    """What a worker says that ends before it serves."""
    try:
        worker.start()
        assert worker.process.wait(60) == 1
        return worker.log
    finally:
        worker.close()


def test_a_plain_celery_worker_without_its_gpu_says_so_in_one_line(
    redis_url: str, models: Path
) -> None:
    said = _refusal(Worker(redis_url, models, env={**TWO_GPUS, "INFERQ_GPU": "2"}))
    line = "inferq: gpu is 2; expected 0 to 1 on this host; `inferq worker --cpu` serves on the CPU"
    assert [each for each in said.splitlines() if "inferq" in each] == [line]
    assert said.endswith(f"{line}\n")
    assert "Traceback" not in said


@pytest.mark.parametrize("supervised", [False, True], ids=["plain", "supervised"])
def test_prefork_is_refused_with_the_reason(redis_url: str, models: Path, supervised: bool) -> None:
    kind = SupervisedWorker if supervised else Worker
    said = _refusal(kind(redis_url, models, env=TWO_GPUS, args=["-P", "prefork"]))
    assert (
        "inferq: pool refused: a worker that holds an engine runs with -P solo only, since threads "
        "and CUDA contexts do not survive prefork's fork\n"
    ) in said
    assert "Traceback" not in said


@pytest.mark.parametrize("supervised", [False, True], ids=["plain", "supervised"])
def test_a_model_for_a_gpu_is_served_on_the_cpu(
    redis_url: str, app: Celery, tmp_path: Path, supervised: bool
) -> None:
    onnx_models.double(tmp_path / "d" / "1" / "model.onnx")
    (tmp_path / "d" / "model.toml").write_text('engine = "tensorrt"\nmax_batch_size = 8\n')
    worker = (
        SupervisedWorker(redis_url, tmp_path, ["d"], args=["--cpu"])
        if supervised
        else Worker(redis_url, tmp_path, ["d"], env={"INFERQ_DEVICE": "cpu"})
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with worker, Client(redis_url) as client:
        np.testing.assert_array_equal(client.infer("d", {"x": x}, timeout=30).outputs["y"], 2 * x)
        said = "model 'd' is served on the CPU by onnxruntime, in place of tensorrt"
        assert worker.log.count(said) == 1
        (stats,) = _stats(app, 1).values()
        assert not [key for key in stats if key.startswith("inferq_gpu")]
