"""Padded models in a real worker: each answers as ONNX Runtime alone does, or is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from helpers import padded_models
from helpers.padded_models import RIGHT, WRONG
from helpers.worker import Worker

from inferq.producer import Client
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.row_probe.agreement import difference

TIMEOUT_S = 60
CLIENTS = 16
#: Requests of each client to one model.
REQUESTS = 20
#: Models that have no batch dim.
UNBATCHED = {"squeezed"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, padded in RIGHT.items():
        padded_models.write(root / name / "1" / "model.onnx", padded)
        (root / name / "model.toml").write_text(padded_models.toml(padded.pad))
    return root


@pytest.fixture(scope="module")
def server(redis_kind: str, root: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, root):
        yield server


@pytest.mark.parametrize("name", RIGHT)
def test_16_clients_get_the_answers_of_onnx_runtime_alone_at_every_size(
    server: EmbeddedRedis, root: Path, name: str
) -> None:
    session = ort.InferenceSession(
        root / name / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    problems: list[str] = []
    company: list[int] = []

    def drive(client: Client, number: int) -> None:
        rng = np.random.default_rng(number)
        for turn in range(REQUESTS):
            inputs = padded_models.request(RIGHT[name], rng, number + CLIENTS * turn)
            result = client.infer(name, inputs, timeout=TIMEOUT_S)
            assert result.receipt is not None
            company.append(result.receipt.requests)
            alone = dict(zip(names, session.run(names, inputs), strict=True))
            found = difference(alone, result.outputs)
            if found is not None:
                shapes = {name: array.shape for name, array in inputs.items()}
                problems.append(f"{shapes}: {found}")

    with Client(server.url) as client:
        threads = [threading.Thread(target=drive, args=(client, n)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    assert len(company) == CLIENTS * REQUESTS
    if name not in UNBATCHED:
        assert max(company) > 1, "different sizes ran together"


@pytest.mark.parametrize("name", ["mask_padded_with_1", "same_stride", "mean"])
def test_a_worker_refuses_padding_that_changes_answers_and_says_what_to_write(
    redis_url: str, tmp_path: Path, name: str
) -> None:
    padded, reason = WRONG[name]
    padded_models.write(tmp_path / name / "1" / "model.onnx", padded)
    (tmp_path / name / "model.toml").write_text(padded_models.toml(padded.pad))
    worker = Worker(redis_url, tmp_path)
    try:
        worker.start()
        assert worker.process.wait(TIMEOUT_S) not in (0, None)
        (line,) = (line for line in worker.log.splitlines() if "answers change" in line)
        assert f"model {name!r}: pad." in line
        assert reason in line
    finally:
        worker.close()
