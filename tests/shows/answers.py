"""Models that servers answer wrongly in batches or under padding, as 16 clients at once see them.

``PYTHONPATH=tests python -m shows.answers`` prints how many answers were not those of ONNX Runtime
alone, by model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from helpers import padded_models, row_models
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.row_probe.agreement import difference

CLIENTS: Final = 16
#: Requests of each client to each model.
REQUESTS: Final = 12
TIMEOUT_S: Final = 60.0

Inputs = dict[str, Array]


@dataclass(frozen=True)
class Shown:
    """A model, its model.toml, and its n-th request."""

    write: Callable[[Path], object]
    toml: str
    request: Callable[[np.random.Generator, int], Inputs]


def _rows(text: str) -> Shown:
    def request(rng: np.random.Generator, n: int) -> Inputs:
        factor = (1, 0, 300, -50, 0.01)[n % 5]
        return {"x": (factor * rng.random((1 + n % 3, 4))).astype(np.float32)}

    return Shown(lambda path: row_models.write(path, text), "", request)


def _padded(name: str) -> Shown:
    padded = padded_models.RIGHT[name]
    return Shown(
        lambda path: padded_models.write(path, padded),
        padded_models.toml(padded.pad),
        lambda rng, n: padded_models.request(padded, rng, n),
    )


SHOWN: Final[Mapping[str, Shown]] = {
    "peaks": _rows(row_models.UNTOLD["peaks"]),
    "threshold": _rows(row_models.UNTOLD["kept"]),
    "batch-mean": _rows(row_models.MIXED["a twentieth of the mean"]),
    "stride": _padded("stride"),
    "mask": _padded("mask"),
}


def wrong_answers() -> dict[str, int]:
    """Model → answers of 16 clients that are not those of ONNX Runtime alone."""
    with _served() as (server, root):
        return {name: _wrong(server, root, name) for name in SHOWN}


@contextmanager
def _served() -> Iterator[tuple[EmbeddedRedis, Path]]:
    with tempfile.TemporaryDirectory(prefix="inferq-show-") as folder:
        root = Path(folder)
        for name, shown in SHOWN.items():
            shown.write(_file(root, name))
            (root / name / "model.toml").write_text(shown.toml)
        with EmbeddedRedis() as server, Worker(server.url, root):
            yield server, root


def _file(root: Path, name: str) -> Path:
    return root / name / "1" / "model.onnx"


def _wrong(server: EmbeddedRedis, root: Path, name: str) -> int:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(_file(root, name), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def ask(number: int) -> int:
        rng = np.random.default_rng(number)
        wrong = 0
        with Client(server.url) as client:
            for turn in range(REQUESTS):
                inputs = SHOWN[name].request(rng, number + CLIENTS * turn)
                outputs = client.infer(name, inputs, timeout=TIMEOUT_S).outputs
                alone = dict(zip(names, session.run(names, inputs), strict=True))
                wrong += difference(alone, outputs) is not None
        return wrong

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = sum(pool.map(ask, range(CLIENTS)))
    print(f"{name}: {found} of {CLIENTS * REQUESTS} answers are not those of the engine alone")
    return found


if __name__ == "__main__":
    print(wrong_answers())
