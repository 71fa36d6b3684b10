"""ONNX Runtime on CUDA in a real worker, without a GPU: an error of the device that stays.

The driver is a fake on the host's memory (helpers/fakecuda), and ONNX Runtime's build with CUDA a
double that computes on the CPU (helpers/double_ort).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import onnx_models
from helpers.fakecuda import environment
from helpers.results import nothing_is_held
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client
from inferq.workers.supervision.health import EX_FATAL_ENGINE

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 60.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    onnx_models.double(root / "double" / "1" / "model.onnx")
    return root


def _on_gpu(driver: Path, **settings: object) -> dict[str, str]:
    env = environment(driver, **settings)
    folders = [str(TESTS), str(TESTS / "helpers" / "double_ort"), env.get("PYTHONPATH", "")]
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def test_an_error_that_stays_ends_the_process_and_its_successor_answers_everything(
    redis_url: str, redis: Redis, models: Path, fake_driver: Path
) -> None:
    knobs = (
        "warm_up = false\naudit_every = 0\npreferred_batch_sizes = [8]\nmax_queue_delay_ms = 500\n"
    )
    (models / "double" / "model.toml").write_text(knobs)
    env = _on_gpu(fake_driver, fail_kernel=6)  # the first process computes five of eight batches
    rows = [np.full((1, 3), n, np.float32) for n in range(60)]
    with SupervisedWorker(redis_url, models, ["double"], env=env) as worker, Client(redis_url) as c:
        for row, each in zip(rows, [c.submit("double", {"x": row}) for row in rows], strict=True):
            np.testing.assert_array_equal(each.result(TIMEOUT_S).outputs["y"], 2 * row)
        until(lambda: f"with status {EX_FATAL_ENGINE}" in worker.log, what="one was replaced")
        assert "CUDA is beyond use: CUDA_ERROR_ILLEGAL_ADDRESS" in worker.log
        assert "onnxruntime on cuda" in worker.log
    until(lambda: nothing_is_held(redis))


def test_one_that_comes_while_it_warms_up_refuses_no_model(
    redis_url: str, models: Path, fake_driver: Path
) -> None:
    worker = Worker(redis_url, models, ["double"], env=_on_gpu(fake_driver, fail_kernel=3))
    worker.start()
    assert worker.process.wait(TIMEOUT_S) == EX_FATAL_ENGINE
    assert "CUDA is beyond use" in worker.log
    worker.close()
