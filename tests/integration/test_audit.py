"""A model whose answers depend on company is found out in service, said, and run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import onnx_models
from helpers.crowd import Answer, ask
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.metrics.counts import ModelStats
from inferq.workers.metrics.published import read_stats

ANY_PORT = {"INFERQ_METRICS": "127.0.0.1:0"}
#: The first audits of a model whose batches are short are not held to any share.
WITHIN = 1_000


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with the model ``company``: y = x and 5 % of the batch's mean."""
    onnx_models.company(tmp_path / "company" / "1" / "model.onnx")
    return tmp_path


@pytest.fixture
def worker(redis_url: str, models: Path) -> Iterator[Worker]:
    with Worker(redis_url, models, env=ANY_PORT) as worker:
        yield worker


def published(redis: Redis, model: str) -> ModelStats | None:
    """What the worker says of `model`."""
    told = [each for stats in read_stats(redis, Names()) for each in stats.models]
    return next((each for each in told if each.model == model), None)


def is_right(answer: Answer) -> bool:
    """Whether it is what ``company`` answers to it alone."""
    return bool(np.allclose(answer.outputs["y"], 1.05 * answer.x, rtol=1e-4, atol=1e-5))


def test_a_model_that_mixes_rows_is_found_within_1000_requests_and_right_from_then_on(
    redis_url: str, redis: Redis, worker: Worker
) -> None:
    before = ask(redis_url, "company", WITHIN)
    assert not all(is_right(answer) for answer in before), "or there was nothing to find"
    assert "model company: answers depend on who shares their batch" in worker.log
    after = ask(redis_url, "company", 300)
    assert all(is_right(answer) for answer in after)
    assert {answer.receipt.requests for answer in after} == {1}
    stats = until(lambda: (said := published(redis, "company")) and said.unbatched and said, 20)
    assert isinstance(stats, ModelStats)
    assert stats.mismatch is not None
    assert stats.mismatch.requests <= WITHIN
