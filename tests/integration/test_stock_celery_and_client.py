"""A bad request gets the same error either way; inferq's own client just gets it sooner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from celery import Celery
from helpers.repository import fake_model, numbered
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.producer import Client
from inferq.producer.pending import State
from inferq.shared.errors import InferqError, ModelNotFound
from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis

WAIT_S = 30.0


@pytest.fixture(scope="module")
def worker(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "echo")
    fake_model(models, "small", knobs="max_request_bytes = 8")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models) as worker:
        yield worker


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with Client(worker.redis_url) as client:
        yield client


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with stock_app(worker.redis_url) as app:
        yield app


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("echo", {"x": np.zeros((1, 4), np.float64)}),
        ("echo", {"x": np.zeros((1, 3), np.float32)}),
        ("echo", {"x": np.zeros(4, np.float32)}),
        ("echo", {"x": np.zeros((0, 4), np.float32)}),
        ("echo", {"y": np.zeros((1, 4), np.float32)}),
        ("echo", {}),
        ("small", {"x": np.zeros((1, 4), np.float32)}),
    ],
)
def test_a_bad_request_is_refused_alike_and_by_the_client_before_it_is_pushed(
    worker: Worker, client: Client, app: Celery, model: str, inputs: dict[str, Any]
) -> None:
    wire = {
        name: {"dtype": x.dtype.str, "shape": x.shape, "data": x.tobytes()}
        for name, x in inputs.items()
    }
    asked = {"model": model, "inputs": wire}
    result = app.send_task("inferq.infer", kwargs=asked, queue=f"inferq.{model}")
    stored = result.get(timeout=WAIT_S, propagate=False)
    worker.pause()  # What is pushed now would stay in the queue.
    try:
        with pytest.raises(InferqError) as refused:
            client.submit(model, inputs).result(timeout=WAIT_S)
        with redis_py.Redis.from_url(worker.redis_url) as store:
            assert not store.llen(Names().queue(model))
    finally:
        worker.resume()
    assert type(refused.value).__name__ == type(stored).__name__
    assert refused.value.message == stored.args[0]


def test_a_model_that_no_worker_serves_is_not_found_by_the_client(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="'nope'"):
        client.infer("nope", {"x": numbered(1)}, timeout=WAIT_S)


def test_a_request_whose_workers_are_all_away_is_queued_and_says_so(
    redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "echo")
    with Worker(redis_url, models) as worker:
        worker.stop()
    with Client(redis_url) as client:
        pending = client.submit("echo", {"x": numbered(1)})
        until(lambda: pending.state is State.QUEUED_NO_WORKER, what="that is known")
        with Worker(redis_url, models, name="second"):
            assert pending.result(timeout=WAIT_S).outputs["x"].tolist() == [[1.0] * 4]
        until(lambda: pending.state is State.DONE)
