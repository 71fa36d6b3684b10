"""Warm-up finds the batch size to aim at, from what the engine really does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from inferq.shared.schema import Array, Signature, TensorSpec
from inferq.workers.batching.padding import PadRule
from inferq.workers.engines.base import Batch, Lane
from inferq.workers.ranges import Usual
from inferq.workers.tuning import Tuning, measure, sample, sizes

PLAIN = Signature(
    (TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 3)),)
)


@pytest.mark.parametrize(
    ("largest", "buckets", "expected"),
    [
        (1, (), [1]),
        (2, (), [1, 2]),
        (12, (), [1, 2, 4, 8, 12]),
        (16, (), [1, 2, 4, 8, 16]),
        (8, (1, 4, 8), [1, 4, 8]),
        (8, (4, 16), [4, 8]),
        (8, (16,), [8]),
        (9, (4, 16, 32), [4, 9]),
    ],
)
def test_buckets_or_powers_of_two_are_tried_up_to_the_largest(
    largest: int, buckets: tuple[int, ...], expected: list[int]
) -> None:
    assert sizes(largest, buckets) == expected


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({1: 100.0}, 1),
        ({1: 100.0, 2: 150.0, 4: 200.0}, 4),
        ({1: 100.0, 2: 200.0, 4: 140.0}, 2),
        ({1: 10.0, 2: 20.0, 4: 20.01}, 2),
        ({1: 10_000.0, 32: 10_000.0}, 32),
    ],
    ids=["one", "larger is better", "larger is worse", "no better", "a batch costs something"],
)
def test_the_smallest_size_that_serves_most_is_best(rates: dict[int, float], best: int) -> None:
    tuning = Tuning(rates)
    assert tuning.best == best
    assert tuning.seconds_per_row == 1 / rates[best]


def test_samples_are_zeros_of_the_models_shapes_and_dtypes() -> None:
    signature = Signature(
        (TensorSpec("a", "int64", ("batch", "n")), TensorSpec("b", "float16", ("batch", 2, "n"))),
        (TensorSpec("y", "float32", ("batch",)),),
    )
    found = sample(signature, 3, {"n": PadRule((4, 8), 0.0)})
    assert found is not None
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "a": ((3, 8), "int64"),
        "b": ((3, 2, 8), "float16"),
    }
    assert not any(array.any() for array in found.values())


@pytest.mark.parametrize("dim", ["n", None])
def test_without_a_known_size_there_is_no_sample_and_no_tuning(dim: str | None) -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", dim)),), PLAIN.outputs)
    assert sample(signature, 1, {}) is None
    assert measure([Timed(lambda rows: 0.0)], signature, [1, 2], {}) is None


def test_a_dim_has_its_usual_size_where_one_is_known() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", "n", "m")),), PLAIN.outputs)
    found = sample(signature, 2, {"m": PadRule((4, 8), 0.0)}, {"n": 5, "batch": 9})
    assert found is not None
    assert found["x"].shape == (2, 5, 8)


class Timed(Lane):
    """A lane whose runs take what `seconds` says of a batch's size."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds
        self.ran: list[int] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.threads: set[int] = set()

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.ran.append(batch.bucket)
        self.shapes.add(batch.parts[0]["x"].shape)
        self.threads.add(threading.get_ident())
        time.sleep(self._seconds(batch.bucket))
        return {"y": np.zeros((batch.rows, 3), np.float32)}


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda rows: 0.02, 8),
        (lambda rows: 0.02 if rows <= 2 else 0.02 * rows, 2),
        (lambda rows: 0.01 * rows**2, 1),
    ],
    ids=["the size costs nothing", "beyond two it does", "the square"],
)
def test_the_size_that_is_fastest_on_the_engine_is_found(
    seconds: Callable[[int], float], best: int
) -> None:
    lanes = [Timed(seconds), Timed(seconds)]
    tuning = measure(lanes, PLAIN, [1, 2, 4, 8], {})
    assert tuning is not None
    assert tuning.best == best
    assert 0.5 < tuning.seconds_per_row / (seconds(best) / best / len(lanes)) < 2


def test_every_size_ran_before_it_may_be_asked_for() -> None:
    """Also those that are too slow to be measured: first runs allocate and compile."""
    lane = Timed(lambda rows: 0.004 * rows**2)
    measure([lane], PLAIN, [1, 2, 4, 8, 16], {})
    assert set(lane.ran) == {1, 2, 4, 8, 16}


def test_lanes_are_measured_side_by_side() -> None:
    lanes = [Timed(lambda rows: 0.02) for _ in range(3)]
    tuning = measure(lanes, PLAIN, [4], {})
    assert tuning is not None
    assert 3 * 4 / 0.02 / 2 < tuning.rows_per_s[4] <= 3 * 4 / 0.02
    assert len({thread for lane in lanes for thread in lane.threads}) >= 3


def test_what_the_engine_raises_is_raised() -> None:
    def fail(rows: int) -> float:
        if rows == 2:
            raise ValueError("no room for two")
        return 0.0

    with pytest.raises(ValueError, match="no room for two"):
        measure([Timed(fail)], PLAIN, [1, 2], {})


def test_the_bucket_of_the_largest_batch_runs_and_is_never_aimed_at() -> None:
    lane = Timed(lambda bucket: 0.02)
    tried = sizes(9, (4, 16, 32))
    tuning = measure([lane], PLAIN, tried, {}, (4, 16, 32))
    assert set(lane.ran) == {4, 16}, "32 is never run"
    assert tuning is not None
    assert tuning.best == 9
    assert set(tuning.rows_per_s) == {4, 9}
    assert tuning.rows_per_s[9] < 9 / 0.02, "padding does not count"


def test_usual_inputs_of_every_profile_run_on_every_lane_and_the_first_are_measured() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", "n")),), PLAIN.outputs)
    lanes = [Timed(lambda rows: 0.02), Timed(lambda rows: 0.02)]
    usual = [Usual({"n": 3}, 8), Usual({"n": 70}, 2)]
    tuning = measure(lanes, signature, [1, 2, 4, 8], {}, (), usual)
    assert tuning is not None
    assert tuning.best == 8
    for lane in lanes:
        assert {shape for shape in lane.shapes if shape[1] == 70} == {(1, 70), (2, 70)}
        assert {shape for shape in lane.shapes if shape[1] == 3} == {(n, 3) for n in (1, 2, 4, 8)}
