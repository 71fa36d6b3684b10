"""A model that runs on the CPU of a worker with a GPU is told of wherever one looks."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from helpers import onnx_models
from helpers.repository import fake_model
from helpers.served import served_model
from prometheus_client import generate_latest
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.data_plane import reporting
from inferq.workers.data_plane.counts import ModelStats, WorkerStats
from inferq.workers.doctor import devices
from inferq.workers.metrics.prometheus import worker_registry


def _stats(root: Path, name: str) -> ModelStats:
    served = served_model(root, name)
    try:
        return reporting.stats(served)
    finally:
        served.close(10)


def _worker(model: ModelStats) -> WorkerStats:
    now = time.time()
    return WorkerStats(
        incarnation="i",
        node="gpu3@here",
        host="here",
        pid=1,
        started_at=now,
        at=now,
        state="serving",
        redis_up=True,
        device="gpu3 H200",
        versions={},
        gpu=None,
        models=[model],
    )


def test_a_model_on_the_cpu_of_a_worker_with_a_gpu_is_told_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    redis: Redis,
) -> None:
    monkeypatch.setenv("INFERQ_GPU", "3")
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx")
    with caplog.at_level(logging.WARNING):
        stats = _stats(tmp_path, "m")
    assert "model m runs on the CPU, though this worker is pinned to GPU 3; expected" in caplog.text
    assert "onnxruntime-gpu" in caplog.text
    assert stats.off_gpu
    worker = _worker(stats)
    metrics = generate_latest(worker_registry(lambda: worker)).decode()
    assert 'inferq_model_off_gpu{model="m"} 1.0' in metrics
    monkeypatch.setattr(devices, "read_stats", lambda *_: [worker])
    (finding,) = devices.devices(redis, Names())
    assert finding.check == "model m"
    assert finding.found == "runs on the CPU of gpu3@here, which is pinned to gpu3 H200"
    assert "onnxruntime-gpu" in finding.todo


def test_a_model_where_it_belongs_is_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx")
    fake_model(tmp_path, "fake")
    assert not _stats(tmp_path, "m").off_gpu
    monkeypatch.setenv("INFERQ_GPU", "3")
    assert not _stats(tmp_path, "fake").off_gpu, "it never runs on a GPU"
