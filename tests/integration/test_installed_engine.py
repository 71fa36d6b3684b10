"""The engine of docs/models.md, installed as a package, serves a model in a real worker."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers.installed import install
from helpers.repository import fake_model
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.schema import Array

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
TIMEOUT_S = 30


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with what is written there, as pip would install it, and with a broken package."""
    _, _, section = DOCS.read_text().partition("## Writing an engine")
    source, project = re.findall(r"```(?:python|toml)\n# [^\n]*\n(.*?)```", section, re.DOTALL)
    points = tomllib.loads(project)["project"]["entry-points"]
    install(tmp_path / "site", "my-matrix", points, {"my_matrix": source})
    install(tmp_path / "site", "broken", {"inferq.engines": {"fake": "nowhere:Engine", "x": "y"}})
    return tmp_path / "site"


def test_the_engine_of_the_docs_serves_its_models_in_batches_beside_our_own(
    redis: Redis, redis_url: str, tmp_path: Path, site: Path
) -> None:
    models = tmp_path / "models"
    fake_model(models, "echo")
    matrix: Array = np.arange(6, dtype=np.float32).reshape(3, 2)
    (models / "matrix" / "1").mkdir(parents=True)
    np.save(models / "matrix" / "1" / "model.npy", matrix)
    (models / "matrix" / "model.toml").write_text("max_queue_delay_ms = 20\n")
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    with (
        Worker(redis_url, models, env={"PYTHONPATH": path}) as worker,
        Client(redis_url) as client,
    ):
        inputs = [np.full((1, 3), n, np.float32) for n in range(20)]
        results = list(client.map("matrix", [{"x": x} for x in inputs], timeout=TIMEOUT_S))
        log = worker.log
        echoed = client.submit("echo", {"x": np.ones((1, 4), np.float32)}).result(TIMEOUT_S)
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_allclose(result.outputs["y"], x @ matrix)
    receipts = [result.receipt for result in results if result.receipt is not None]
    assert {receipt.engine for receipt in receipts} == {"matrix"}
    assert max(receipt.requests for receipt in receipts) > 1
    np.testing.assert_array_equal(echoed.outputs["x"], np.ones((1, 4)))
    for name in ("fake", "x"):
        assert log.count(f"the engine {name!r} of broken is not used: ") == 1
