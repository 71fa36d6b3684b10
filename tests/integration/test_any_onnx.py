"""A model never seen before, dropped into the repository without a model.toml, is served right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import onnx_models
from helpers.worker import Worker

from inferq.producer import Client, Result
from inferq.shared.errors import EngineError, InvalidInput
from inferq.shared.schema import Array, Receipt
from inferq.workers.process.embedded import EmbeddedRedis

TIMEOUT_S = 30


@pytest.fixture(scope="module")
def client(
    redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A client of a worker that serves one model of each kind."""
    root = tmp_path_factory.mktemp("models")

    def file(model: str) -> Path:
        return root / model / "1" / "model.onnx"

    onnx_models.double(file("plain"))
    onnx_models.two_inputs(file("several_inputs"))
    onnx_models.double(file("fixed_batch"), (1, 3))
    onnx_models.two_inputs(file("no_common_batch"), ("n", 2), ("m", 2))
    onnx_models.pooled(file("dynamic_inner"))
    onnx_models.mixed_rows(file("mixed_rows"))
    onnx_models.first_row(file("first_row"))
    onnx_models.lookup(file("lookup"))
    with Worker(redis_server.url, root), Client(redis_server.url) as client:
        yield client


def _rows(first: int, *shape: int) -> Array:
    return np.arange(first, first + np.prod(shape), dtype=np.float32).reshape(shape)


def _receipt(result: Result) -> Receipt:
    assert result.receipt is not None
    return result.receipt


def test_rows_of_many_requests_are_batched_and_told_apart(client: Client) -> None:
    items = [{"x": _rows(n, 1 + n % 4, 3)} for n in range(100)]
    results = list(client.map("plain", items, in_flight=64))
    for item, result in zip(items, results, strict=True):
        assert np.array_equal(result.outputs["y"], 2 * item["x"])
    assert max(_receipt(result).requests for result in results) > 1


def test_several_inputs_stay_together(client: Client) -> None:
    items = [{"a": _rows(n, 2, 2), "b": _rows(-n, 2, 2)} for n in range(20)]
    for item, result in zip(items, client.map("several_inputs", items), strict=True):
        assert np.array_equal(result.outputs["c"], 2 * item["a"])
        assert np.array_equal(result.outputs["d"], 2 * item["b"])


def test_inputs_with_different_rows_are_refused_where_they_share_a_batch(client: Client) -> None:
    with pytest.raises(InvalidInput, match="batch"):
        client.infer("several_inputs", {"a": _rows(0, 2, 2), "b": _rows(0, 3, 2)}, timeout=5)


def test_a_fixed_batch_of_one_is_served_one_by_one(client: Client) -> None:
    items = [{"x": _rows(n, 1, 3)} for n in range(20)]
    for item, result in zip(items, client.map("fixed_batch", items), strict=True):
        assert np.array_equal(result.outputs["y"], 2 * item["x"])
        assert (_receipt(result).requests, _receipt(result).batch_size) == (1, 1)
    with pytest.raises(InvalidInput, match="expected 1"):
        client.infer("fixed_batch", {"x": _rows(0, 2, 3)}, timeout=TIMEOUT_S)


def test_inputs_without_a_common_batch_dim_are_served_as_they_are(client: Client) -> None:
    a, b = _rows(0, 2, 2), _rows(0, 5, 2)
    outputs = client.infer("no_common_batch", {"a": a, "b": b}, timeout=TIMEOUT_S).outputs
    assert np.array_equal(outputs["c"], 2 * a)
    assert np.array_equal(outputs["d"], 2 * b)


def test_requests_of_different_inner_sizes_are_each_served_right(client: Client) -> None:
    items = [{"x": _rows(n, 1, 1 + n % 5, 4)} for n in range(50)]
    for item, result in zip(items, client.map("dynamic_inner", items), strict=True):
        assert np.array_equal(result.outputs["y"], 2 * item["x"])
        assert np.allclose(result.outputs["sum"], item["x"].sum(axis=1))


def test_no_answer_depends_on_other_requests(client: Client) -> None:
    items = [{"x": _rows(n, 1, 3)} for n in range(20)]
    for result in client.map("mixed_rows", items):
        assert np.allclose(result.outputs["y"], 1.0)


def test_an_output_that_does_not_follow_the_rows_is_served_as_it_is(client: Client) -> None:
    x = _rows(0, 4, 3)
    result = client.infer("first_row", {"x": x}, timeout=TIMEOUT_S)
    assert np.array_equal(result.outputs["y"], x[:1])


def test_only_the_request_that_the_engine_cannot_run_fails(client: Client) -> None:
    pending = [client.submit("lookup", {"ids": np.array([n])}) for n in (0, 1, 99, 2, 3)]
    with pytest.raises(EngineError, match="out of data bounds"):
        pending[2].result(TIMEOUT_S)
    for n, each in zip((0, 1, 2, 3), pending[:2] + pending[3:], strict=True):
        assert each.result(TIMEOUT_S).outputs["y"].tolist() == [[2 * n, 2 * n + 1]]
