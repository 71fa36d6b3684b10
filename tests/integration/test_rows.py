"""16 clients at once are answered as ONNX Runtime alone answers, request by request."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
import pytest
from helpers import onnx_models, row_models
from helpers.worker import Worker

from inferq.producer import Client, Result
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

CLIENTS: Final = 16
REQUESTS: Final = 12
TIMEOUT_S: Final = 60

#: Model → its file in ONNX' notation.
TEXTS: Final = {
    name.replace(" ", "-").replace("'", ""): text
    for name, text in {**row_models.UNTOLD, **row_models.MIXED}.items()
}
#: Model → (its file, its model.toml).
CONFIGURED: Final = {
    "at-most-one": (row_models.UNTOLD["kept"], "max_batch_size = 1"),
    "told-not-to": (row_models.INDEPENDENT["doubled"], "batchable = false"),
    "told-to": (row_models.MIXED["scaled by the largest"], "batchable = true"),
    "independent": (row_models.INDEPENDENT["largest of its own"], ""),
}
#: Of all those, the models whose requests share batches.
BATCHED: Final = ("told-to", "independent")
#: A picture whose height and width both have the name that is none.
PICTURE: Final = "picture"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, text in TEXTS.items():
        row_models.write(_file(root, name), text)
    for name, (text, toml) in CONFIGURED.items():
        row_models.write(_file(root, name), text)
        (root / name / "model.toml").write_text(toml)
    onnx_models.double(_file(root, PICTURE), (None, 3, "?", "?"))
    return root


@pytest.fixture(scope="module")
def worker(redis_server: EmbeddedRedis, root: Path) -> Iterator[Worker]:
    with Worker(redis_server.url, root) as worker:
        yield worker


def _file(root: Path, model: str) -> Path:
    return root / model / "1" / "model.onnx"


@cache
def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _inputs(session: ort.InferenceSession, seed: int) -> dict[str, Array]:
    """One request: of one row mostly, of several, of zeros, of large or of negative values."""
    rng = np.random.default_rng(seed)
    rows = 1 if seed % 3 else 1 + seed % 5
    size = 4 + seed % 3
    arrays: dict[str, Array] = {}
    for node in session.get_inputs():
        shape = [rows, *(dim if isinstance(dim, int) else size for dim in node.shape[1:])]
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        if kind == "string":  # of numbers, whatever reads them
            arrays[node.name] = rng.integers(0, 8, shape).astype(str).astype(object)
            continue
        dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
        if np.dtype(dtype).kind == "f":
            factor = (1, 0, 300, -50, 0.01)[seed % 5]
            arrays[node.name] = (factor * rng.random(shape)).astype(dtype)
        else:
            arrays[node.name] = rng.integers(0, 8, shape).astype(dtype)
    return arrays


def _served(url: str, requests: list[tuple[str, dict[str, Array]]]) -> list[Result]:
    """The answers of `requests` to models, of which each of 16 clients sends a share at once."""

    def ask(share: list[tuple[str, dict[str, Array]]]) -> list[Result]:
        with Client(url) as client:
            pending = [client.submit(model, inputs) for model, inputs in share]
            return [each.result(TIMEOUT_S) for each in pending]

    with ThreadPoolExecutor(CLIENTS) as pool:
        shares = pool.map(ask, [requests[n::CLIENTS] for n in range(CLIENTS)])
        answers: list[Result | None] = [None] * len(requests)
        for n, share in enumerate(shares):
            answers[n::CLIENTS] = share
    return [answer for answer in answers if answer is not None]


@pytest.mark.parametrize("model", [*TEXTS, *(CONFIGURED.keys() - {"told-to"})])
def test_every_answer_is_that_of_the_engine_alone(
    worker: Worker, redis_server: EmbeddedRedis, root: Path, model: str
) -> None:
    session = _session(_file(root, model))
    names = [node.name for node in session.get_outputs()]
    requests = [(model, _inputs(session, seed)) for seed in range(REQUESTS * CLIENTS)]
    answers = _served(redis_server.url, requests)
    for (_, inputs), answer in zip(requests, answers, strict=True):
        assert list(answer.outputs) == names
        for name, alone in zip(names, session.run(names, inputs), strict=True):
            got = answer.outputs[name]
            assert (got.shape, got.dtype) == (alone.shape, alone.dtype)
            assert np.array_equal(got, alone, equal_nan=alone.dtype.kind == "f")
    if model not in BATCHED:
        assert {answer.receipt.requests for answer in answers if answer.receipt} == {1}


@pytest.mark.parametrize("model", BATCHED)
def test_requests_share_batches_where_rows_are_independent_or_model_toml_says_so(
    worker: Worker, redis_server: EmbeddedRedis, model: str
) -> None:
    requests = [(model, {"x": np.full((1, 4), n, np.float32)}) for n in range(20 * CLIENTS)]
    answers = _served(redis_server.url, requests)
    assert max(answer.receipt.requests for answer in answers if answer.receipt) > 1


def test_a_picture_that_is_not_square_is_served_though_both_sizes_are_called_alike(
    worker: Worker, redis_server: EmbeddedRedis
) -> None:
    x = np.random.default_rng(0).random((1, 3, 48, 192), np.float32)
    with Client(redis_server.url) as client:
        outputs = client.infer(PICTURE, {"x": x}, timeout=TIMEOUT_S).outputs
    assert np.array_equal(outputs["y"], x + x)


def test_the_log_says_once_by_how_much_rows_differ_and_what_to_write(worker: Worker) -> None:
    for model, said in (
        ("scaled-by-the-largest", "runs request by request: answers depend on the rows beside"),
        ("peaks", "runs request by request: the rows of output 'where' do not follow those of"),
        ("told-not-to", "runs request by request: model.toml says batchable = false"),
        ("told-to", "is batched: model.toml says so, though answers depend on the rows beside"),
    ):
        lines = [line for line in worker.log.splitlines() if f"model {model} {said}" in line]
        assert len(lines) == 1
    assert "model independent runs request by request" not in worker.log
    (line,) = [
        each for each in worker.log.splitlines() if "model scaled-by-the-largest runs" in each
    ]
    assert "batchable = true in model.toml" in line
    assert "cosine 0.99" in line
