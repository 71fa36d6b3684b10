"""A program that torch.export wrote, dropped into the repository, is served through the queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared.errors import EngineError
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install "inferq[torch]"')

from helpers import torch_models  # noqa: E402 - it needs PyTorch

TIMEOUT_S = 30
TRAINED = 1400


@pytest.fixture(scope="module")
def images_and_labels() -> tuple[Array, Array]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return images.reshape(-1, 1, 8, 8).astype(np.float32), labels


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, images_and_labels: tuple[Array, Array]) -> Path:
    root = tmp_path_factory.mktemp("models")
    images, labels = images_and_labels
    torch_models.digits(root / "digits" / "1" / "model.pt2", images[:TRAINED], labels[:TRAINED])
    torch_models.lookup(root / "lookup" / "1" / "model.pt2")
    (root / "lookup" / "model.toml").write_text("max_queue_delay_ms = 20\n[torch]\ndevice='cpu'\n")
    torch_models.pooled(root / "pooled" / "1" / "model.pt2")
    # PyTorch does not keep the names of dims.
    (root / "pooled" / "model.toml").write_text(
        "max_queue_delay_ms = 5\n[pad.dim1]\nbuckets = [4, 9]\n"
    )
    return root


@pytest.fixture(scope="module")
def client(redis_server: EmbeddedRedis, root: Path) -> Iterator[Client]:
    with Worker(redis_server.url, root), Client(redis_server.url) as client:
        yield client


def test_digits_are_told_apart_in_batches_as_torch_does(
    client: Client, root: Path, images_and_labels: tuple[Array, Array]
) -> None:
    images, labels = (each[TRAINED:] for each in images_and_labels)
    program = torch.export.load(root / "digits" / "1" / "model.pt2").module()
    with torch.inference_mode():
        wanted = program(torch.from_numpy(images))["logits"].numpy()
    items = [{"image": image[None]} for image in images]
    results = list(client.map("digits", items, in_flight=64))
    logits = np.concatenate([result.outputs["logits"] for result in results])
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)
    digits = np.concatenate([result.outputs["digit"] for result in results])
    assert float(np.mean(digits == labels)) > 0.9
    receipts = [result.receipt for result in results if result.receipt is not None]
    assert {receipt.engine for receipt in receipts} == {"torch"}
    assert max(receipt.requests for receipt in receipts) > 1


def test_only_the_request_that_the_program_cannot_run_fails(client: Client) -> None:
    pending = [client.submit("lookup", {"ids": np.array([n])}) for n in (0, 1, 99, 2, 3)]
    with pytest.raises(EngineError, match="index 99 is out of bounds"):
        pending[2].result(TIMEOUT_S)
    for n, each in zip((0, 1, 2, 3), pending[:2] + pending[3:], strict=True):
        assert each.result(TIMEOUT_S).outputs["y"].tolist() == [[2 * n, 2 * n + 1]]


def test_padded_sizes_share_batches_and_answer_as_alone(client: Client) -> None:
    rng = np.random.default_rng(0)
    items = [{"x": rng.standard_normal((1, 2 + n % 8, 4), np.float32)} for n in range(64)]
    company = []
    for item, result in zip(items, client.map("pooled", items), strict=True):
        np.testing.assert_array_equal(result.outputs["y"], 2 * item["x"])
        np.testing.assert_allclose(result.outputs["sum"], item["x"].sum(axis=1), rtol=1e-4)
        assert result.receipt is not None
        company.append(result.receipt.requests)
    assert max(company) > 2
