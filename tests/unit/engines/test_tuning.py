"""The batch size to aim at follows from the run times that were measured."""

from __future__ import annotations

import pytest

from inferq.shared.schema import Signature, TensorSpec
from inferq.workers.batching.padding import PadRule
from inferq.workers.engines.tuning import PER_BATCH_S, Line, Tuning, fitted, sample, sizes

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
    ("seconds", "best"),
    [
        ({1: 0.01}, 1),
        ({1: 0.01, 2: 2 / 150, 4: 4 / 200}, 4),
        ({1: 0.01, 2: 0.01, 4: 4 / 140}, 2),
        ({1: 0.1, 2: 0.1, 4: 4 / 20.01}, 2),
        ({1: 0.0001, 32: 0.0032}, 32),
    ],
    ids=["one", "larger is better", "larger is worse", "no better", "a batch costs something"],
)
def test_the_smallest_size_that_serves_most_is_best(seconds: dict[int, float], best: int) -> None:
    tuning = Tuning(seconds, tuple(seconds))
    assert tuning.best == best
    assert tuning.seconds_per_row == seconds[best] / best


def test_several_lanes_share_the_rows() -> None:
    tuning = Tuning({4: 0.1}, (4,), lanes=2)
    assert tuning.rows_per_s(4) == pytest.approx(4 / (0.05 + PER_BATCH_S))
    assert tuning.seconds_per_row == 0.1 / 4 / 2


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        ({1: 3.0, 2: 5.0, 8: 17.0}, Line(1.0, 2.0)),
        ({1: 10.0, 2: 10.0}, Line(10.0, 0.0)),
        ({4: 2.0}, Line(0.0, 0.5)),
        ({1: 1.0, 2: 3.0}, Line(0.0, 15 / 13)),
        ({1: 2.0, 2: 1.0}, Line(1.2, 0.0)),
    ],
    ids=["both parts", "the size costs nothing", "one point", "no part < 0", "nor of a row"],
)
def test_a_line_has_a_fixed_part_and_one_for_each_row(
    seconds: dict[int, float], line: Line
) -> None:
    found = fitted(seconds)
    assert found.fixed_s == pytest.approx(line.fixed_s, abs=1e-9)
    assert found.per_row_s == pytest.approx(line.per_row_s, abs=1e-9)


def test_what_was_not_tried_is_expected_to_lie_on_the_line() -> None:
    """Two batches of 10 s each, whatever their size, tell that one of 32 takes 10 s, too."""
    tuning = Tuning({1: 10.0, 2: 10.0}, (1, 2, 4, 8, 16, 32))
    assert tuning.batch_s(32) == pytest.approx(10.0)
    assert tuning.best == 32
    assert Tuning({1: 10.0, 2: 20.0}, (1, 2, 4, 8, 16, 32)).best == 1


def test_what_lies_between_two_sizes_is_on_the_line_through_both() -> None:
    tuning = Tuning({1: 1.0, 4: 4.0, 8: 5.0}, (1, 2, 4, 8))
    assert tuning.batch_s(2) == pytest.approx(2.0)
    assert tuning.batch_s(6) == pytest.approx(4.5)


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


@pytest.mark.parametrize(("dtype", "zero"), [("string", "0"), ("bytes", b"0")])
def test_samples_of_text_are_zeros_too_which_models_that_read_numbers_take(
    dtype: str, zero: object
) -> None:
    spec = TensorSpec("x", dtype, ("batch", 2))
    found = sample(Signature((spec,), (spec,)), 3, {})
    assert found is not None
    assert found["x"].tolist() == [[zero, zero]] * 3


@pytest.mark.parametrize("dim", ["n", None])
def test_without_a_known_size_there_is_no_sample(dim: str | None) -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", dim)),), PLAIN.outputs)
    assert sample(signature, 1, {}) is None


def test_a_dim_has_its_optimum_size_where_one_is_known() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", "n", "m")),), PLAIN.outputs)
    found = sample(signature, 2, {"m": PadRule((4, 8), 0.0)}, {"n": 5, "batch": 9})
    assert found is not None
    assert found["x"].shape == (2, 5, 8)
