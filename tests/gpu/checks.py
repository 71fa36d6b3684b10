"""Are the answers right, row by row? A check that could not fail would be worth nothing.

The rows that are sent are chosen such that the right answers to any two of them are apart by
`APART` times the error that passes: so a row in another's place, or one row for all, is found. That
it is found is tried with the answers themselves, each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from inferq.shared.schema import Array, TensorSpec
from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine
from inferq.workers.models.engine import Batch
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.verify import FLOOR, LIMITS

#: By how many times the error that passes two rows' answers are apart at least.
APART: Final = 10
#: Rows that are tried, and how many of them have to be told apart.
CANDIDATES: Final = 64
FEWEST: Final = 3
#: Values of integers that are no pictures: bytes, and one for "none".
_VALUES: Final = 257
#: Along a side of all pictures: what one model tells apart is all the same to another.
_SQUARES: Final = (2, 4)


class WrongAnswers(Exception):
    """What came is not what ONNX Runtime answers, or could not be told from what is not."""


@dataclass(frozen=True)
class Expected:
    """Rows that are told apart by their answers, and these, by ONNX Runtime."""

    rows: Sequence[Mapping[str, Array]]
    #: One row for each of `rows`.
    answers: Mapping[str, Array]
    #: The largest magnitude of each output.
    scales: Mapping[str, float]
    limit: float

    def batch(self, rows: int, bucket: int, seed: int) -> tuple[Batch, dict[str, Array]]:
        """Requests of one row each, no two neighbours alike, and the right answers."""
        order = self.order(rows, seed)
        right = {name: array[order] for name, array in self.answers.items()}
        return Batch([dict(self.rows[n]) for n in order], rows, bucket), right

    def order(self, rows: int, seed: int) -> list[int]:
        """Which of `rows` stand where: at random, but no neighbours alike."""
        rng = np.random.default_rng(seed)
        order = [int(rng.integers(len(self.rows)))]
        while len(order) < rows:
            step = int(rng.integers(1, len(self.rows)))
            order.append((order[-1] + step) % len(self.rows))
        return order

    def check(self, given: Mapping[str, Array], right: Mapping[str, Array]) -> float:
        """The largest error of `given`. WrongAnswers: it is above the limit, or two rows in each
        other's place would pass, too.
        """
        error = self.error(given, right)
        if not error <= self.limit:
            raise WrongAnswers(f"answers differ by {error:.3g}; expected at most {self.limit:g}")
        rows = min(len(array) for array in right.values())
        for n in range(0, rows - 1, 2):
            swapped = list(range(rows))
            swapped[n], swapped[n + 1] = n + 1, n
            wrong = {name: array[swapped] for name, array in given.items()}
            if self.error(wrong, right) <= self.limit:
                raise WrongAnswers(f"rows {n} and {n + 1} in each other's place would not be found")
        return error

    def error(self, given: Mapping[str, Array], right: Mapping[str, Array]) -> float:
        """Largest difference, relative to the largest magnitude of its output."""
        return max(
            _error(name, given.get(name), array, self.scales[name]) for name, array in right.items()
        )


def expect(spec: ModelSpec, precision: str) -> Expected:
    """Rows for `spec`, a batchable model in an ONNX file. WrongAnswers: too few are told apart."""
    limit = LIMITS[precision]
    found = (_apart(*_answered(spec, _candidates(spec, each)), limit) for each in _SQUARES)
    return _enough(spec.name, max(found, key=lambda each: len(each.rows)))


def choose(
    model: str, rows: Sequence[Mapping[str, Array]], answers: Mapping[str, Array], limit: float
) -> Expected:
    """Those of `rows` whose `answers` are told apart. WrongAnswers: they are too few."""
    return _enough(model, _apart(rows, answers, limit))


def _apart(
    rows: Sequence[Mapping[str, Array]], answers: Mapping[str, Array], limit: float
) -> Expected:
    """Those of `rows` whose `answers` are apart from all that were chosen before."""
    scales = {name: float(np.abs(array).max(initial=0)) for name, array in answers.items()}
    all_of = Expected(rows, answers, scales, limit)
    chosen: list[int] = []
    for n in range(len(rows)):
        row = {name: array[n : n + 1] for name, array in answers.items()}
        others = ({name: array[m : m + 1] for name, array in answers.items()} for m in chosen)
        if all(all_of.error(row, other) >= APART * limit for other in others):
            chosen.append(n)
    kept = {name: array[chosen] for name, array in answers.items()}
    return Expected([rows[n] for n in chosen], kept, scales, limit)


def _enough(model: str, found: Expected) -> Expected:
    if len(found.rows) < FEWEST:
        raise WrongAnswers(
            f"{len(found.rows)} inputs of model {model!r} have answers that are apart by "
            f"{APART * found.limit:g} of the largest; expected at least {FEWEST}: rows that change "
            "places would not be found"
        )
    return found


def _answered(
    spec: ModelSpec, rows: Sequence[Mapping[str, Array]]
) -> tuple[Sequence[Mapping[str, Array]], Mapping[str, Array]]:
    inputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    with closing(OnnxRuntimeEngine(replace(spec, engine_table={"provider": "cpu"})).load()) as ort:
        return rows, ort.lanes[0].run(Batch([inputs], 1, 1, batchable=False))


def _candidates(spec: ModelSpec, squares: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [
        {tensor.name: _row(tensor, rng, squares) for tensor in spec.signature.inputs}
        for _ in range(CANDIDATES)
    ]


def _row(tensor: TensorSpec, rng: np.random.Generator, squares: int) -> Array:
    shape = (1, *(int(dim or 1) for dim in tensor.shape[1:]))
    if tensor.dtype == "uint8" and len(shape) == 4:
        return picture(rng, shape[1], squares)[None]
    if np.dtype(tensor.dtype).kind == "f":
        return rng.standard_normal(shape).astype(tensor.dtype)
    # Bytes of one kind or another, as files have them: any would look alike.
    least = int(rng.integers(0, _VALUES - 1))
    most = int(rng.integers(least + 1, _VALUES))
    return rng.integers(least, most, shape).astype(tensor.dtype)


def picture(rng: np.random.Generator, side: int, squares: int = 2) -> Array:
    """uint8[side, side, 3] of `squares` times as many: of fine ones a network sees the mean."""
    colours = rng.integers(0, 256, (squares, squares, 3), np.uint8)
    return np.kron(colours, np.ones((side // squares, side // squares, 1), np.uint8))


def _error(name: str, given: Array | None, right: Array, scale: float) -> float:
    if given is None or given.shape != right.shape or given.dtype != right.dtype:
        shown = "missing" if given is None else f"{given.dtype}{list(given.shape)}"
        raise WrongAnswers(f"output {name!r} is {shown}; expected {right.dtype}{list(right.shape)}")
    if right.dtype.kind != "f":
        return float(np.mean(given != right)) if right.size else 0.0
    a, b = given.astype(np.float64), right.astype(np.float64)
    if not np.all(np.isfinite(a) & np.isfinite(b)):
        return math.inf
    return float(np.abs(a - b).max(initial=0.0)) / (scale + FLOOR)
