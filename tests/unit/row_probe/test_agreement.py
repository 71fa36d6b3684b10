"""Two runs agree but for rounding; what they differ by is told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inferq.workers.row_probe.agreement import difference

BASE = np.linspace(-3, 10, 1000).reshape(10, 100)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
def test_rounding_is_no_difference(dtype: str) -> None:
    exact = BASE.astype(dtype)
    epsilon = np.finfo(dtype).eps
    assert difference({"y": exact}, {"y": (exact * (1 + 2 * epsilon)).astype(dtype)}) is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_a_twentieth_of_a_mean_is_a_difference(dtype: str) -> None:
    exact = BASE.astype(dtype)
    found = difference({"y": exact}, {"y": (exact + 0.05 * exact.mean()).astype(dtype)})
    assert found is not None
    assert found.share == pytest.approx(0.05 * BASE.mean() / 10, rel=0.1)
    assert found.cosine is not None
    assert 0.99 < found.cosine < 1


def test_runs_of_equal_shapes_may_be_held_to_less() -> None:
    exact = BASE.astype(np.float32)
    off = exact + np.float32(1e-4)
    assert difference({"y": exact}, {"y": off}) is None
    assert difference({"y": exact}, {"y": off}, scale=0.01) is not None


def test_values_smaller_than_typical_may_differ_by_the_rounding_of_typical_ones() -> None:
    tiny, other = np.full(3, 1e-6, np.float32), np.full(3, 2e-6, np.float32)
    assert difference({"y": tiny}, {"y": other}) is not None
    assert difference({"y": tiny}, {"y": other}, typical_max=1.0) is None
    assert difference({"y": tiny}, {"y": other}, typical_max=1e-3) is not None


def test_integers_and_flags_are_compared_by_value() -> None:
    found = difference({"y": np.array([1, 2, 3])}, {"y": np.array([1, 2, 4])})
    assert found is not None
    assert str(found) == "output 'y' differs in 1 of 3 values"
    assert difference({"y": np.array([True])}, {"y": np.array([False])}) is not None
    assert difference({"y": np.array([7], "u8")}, {"y": np.array([7], "u8")}) is None


def test_shapes_and_places_of_nan_must_be_the_same() -> None:
    found = difference({"y": np.zeros((2, 3))}, {"y": np.zeros((1, 3))})
    assert found is not None
    assert str(found) == "output 'y' differs in shape: [1, 3] in place of [2, 3]"
    assert found.share == math.inf
    one, other = np.array([1.0, np.nan]), np.array([np.nan, 1.0])
    assert difference({"y": one}, {"y": one.copy()}) is None
    assert difference({"y": one}, {"y": other}) is not None
    assert difference({"y": np.array([np.inf])}, {"y": np.array([-np.inf])}) is not None
    assert difference({"y": np.array([1.0])}, {"y": np.array([np.inf])}) is not None


def test_the_largest_difference_of_several_outputs_is_told() -> None:
    alone = {"a": np.ones(3), "b": np.ones(3)}
    found = difference(alone, {"a": np.full(3, 1.1), "b": np.full(3, 1.5)})
    assert found is not None
    assert found.output == "b"


@pytest.mark.parametrize("filler", [-1e9, -1e6, np.finfo("f4").min, 1.7e9])
@pytest.mark.parametrize("scores", [1, 2, 50])
def test_what_a_mask_puts_in_place_of_scores_hides_no_change_of_them(
    filler: float, scores: int
) -> None:
    exact = np.full(100, filler, np.float32)
    exact[:scores] = np.linspace(0.5, 1, scores)
    off = exact.copy()
    off[:scores] *= 1.05
    found = difference({"y": exact}, {"y": off})
    assert found is not None
    assert found.share == pytest.approx(0.05, rel=0.1)
    assert difference({"y": exact}, {"y": exact * np.float32(1 - 1e-6)}) is None


def test_values_next_to_nothing_round_by_the_larger_ones_beside_them() -> None:
    exact = np.linspace(-1, 1, 1000, dtype=np.float32)
    exact[7] = 1e-9
    off = exact.copy()
    off[7] = 1e-6
    assert difference({"y": exact}, {"y": off}) is None


def test_a_difference_from_zeros_is_told_as_one() -> None:
    found = difference({"y": np.zeros(2)}, {"y": np.array([0.0, 1.5])})
    assert str(found) == "output 'y' differs by 1.5 from zeros"


def test_nothing_is_equal_to_nothing() -> None:
    empty = {"y": np.zeros((0, 4), np.float32)}
    assert difference(empty, {"y": np.zeros((0, 4), np.float32)}) is None


def test_strings_agree_exactly_or_differ() -> None:
    expected = np.array(["a", "b", "", "ü"], object)
    assert difference({"y": expected}, {"y": expected.copy()}) is None
    found = difference({"y": expected}, {"y": np.array(["a", "b", " ", "u"], object)})
    assert found is not None
    assert str(found) == "output 'y' differs in 2 of 4 values"
    longer = difference({"y": expected}, {"y": expected[:3]})
    assert longer is not None
    assert longer.share == math.inf
