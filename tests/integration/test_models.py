"""Models with more to them than a plain batch: padded dims, scalars, and those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from celery import Celery
from helpers import onnx_models
from helpers.bad_models import far_lookup, file, put
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared.errors import InvalidInput
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

TIMEOUT_S = 30
PAD = (
    "lanes = 1\nmax_queue_delay_ms = 50\npreferred_batch_sizes = [8]\n[pad.seq]\nbuckets = [4, 8]\n"
)


@pytest.fixture(scope="module")
def client(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("models")
    onnx_models.pooled(file(root, "padded"))
    (root / "padded" / "model.toml").write_text(PAD)
    onnx_models.double(file(root, "scalar"), ())
    onnx_models.write(
        file(root, "mixed"),
        [onnx_models.node("Add", "aa", "c"), onnx_models.node("Add", "bb", "d")],
        {"a": (onnx_models.FLOAT, ("batch", "n")), "b": (onnx_models.INT64, ("batch", "m"))},
        {"c": (onnx_models.FLOAT, ("batch", "n")), "d": (onnx_models.INT64, ("batch", "m"))},
    )
    (root / "mixed" / "model.toml").write_text("lanes = 1\nmax_queue_delay_ms = 50\n")
    with (
        EmbeddedRedis(redis_kind) as server,
        Worker(server.url, root),
        Client(server.url) as client,
    ):
        yield client


def sequence(n: int, length: int) -> Array:
    return np.random.default_rng(n).random((1 + n % 2, length, 4), np.float32)


def test_padded_sizes_share_batches_and_are_cut_back(client: Client) -> None:
    items = [{"x": sequence(n, 1 + n % 8)} for n in range(64)]
    requests = []
    for item, result in zip(items, client.map("padded", items), strict=True):
        np.testing.assert_array_equal(result.outputs["y"], 2 * item["x"])
        np.testing.assert_allclose(result.outputs["sum"], item["x"].sum(axis=1), rtol=1e-6)
        assert result.receipt is not None
        requests.append(result.receipt.requests)
    assert sum(requests) / len(requests) > 2, "different sizes ran together"


def test_a_size_over_the_last_bucket_is_refused_with_the_reason(client: Client) -> None:
    with pytest.raises(InvalidInput, match=r"'x': dim 1 \(seq\) is 9; expected at most 8"):
        client.infer("padded", {"x": sequence(0, 9)}, timeout=TIMEOUT_S)


def test_inputs_of_two_dtypes_and_open_sizes_are_told_apart(client: Client) -> None:
    """Sizes that agree only if the inputs are mixed up must not meet in a batch."""
    items: list[dict[str, Array]] = []
    for n in range(40):
        a: Array = np.full((1, 1 + n % 2), n, np.float32)
        b: Array = np.full((1, 2 - n % 2), n, np.int64)
        items.append({"a": a, "b": b} if n % 4 < 2 else {"b": b, "a": a})
    for item, result in zip(items, client.map("mixed", items), strict=True):
        np.testing.assert_array_equal(result.outputs["c"], 2 * item["a"])
        np.testing.assert_array_equal(result.outputs["d"], 2 * item["b"])


def test_a_scalar_goes_in_and_comes_out(client: Client) -> None:
    result = client.infer("scalar", {"x": np.float32(1.5)}, timeout=TIMEOUT_S)
    assert result.outputs["y"].shape == ()
    assert result.outputs["y"] == 3.0


def test_a_stock_client_sends_a_scalar_as_a_number(client: Client) -> None:
    url = client._settings.redis_url
    app = Celery(broker=url, backend=url, set_as_current=False)
    sent = app.send_task("inferq.infer", [{"x": 1.5}], queue="inferq.scalar")
    answer = sent.get(timeout=TIMEOUT_S)
    assert json.loads(json.dumps(answer))["y"] == {"dtype": "<f4", "shape": [], "data": 3.0}
    app.close()


# --- refused -------------------------------------------------------------------------------------


def junk(path: Path) -> Path:
    return put(path, b"no model")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (junk, "is no whole ONNX file"),
        (onnx_models.split, "output 'y' of the model is a seq(tensor(float)); expected"),
        (far_lookup, "out of data bounds"),
    ],
)
def test_a_model_that_cannot_be_served_ends_its_worker_with_the_reason(
    redis_url: str, tmp_path: Path, write: Callable[[Path], Path], reason: str
) -> None:
    write(file(tmp_path, "x"))
    worker = Worker(redis_url, tmp_path, ["x"])
    try:
        worker.start()
        assert worker.process.wait(60) not in (0, None)
        assert any(reason in line for line in worker.log.splitlines())
        assert str(file(tmp_path, "x")) in worker.log
    finally:
        worker.close()
