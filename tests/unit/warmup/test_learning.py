"""Batches in service go on refining which size is best, without a change for nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from inferq.workers.engines.tuning import Tuning
from inferq.workers.warmup.learning import ENOUGH, LOOK, LOOKS, Learner

SIZES = (1, 2, 4, 8, 16, 32)
#: A fixed second, and a tenth for each row.
FLAT = {size: 1 + 0.1 * size for size in SIZES}


def _serve(learner: Learner, seconds: Callable[[int], float], sizes: list[int]) -> list[int]:
    """The targets that it took."""
    return [learner.target for size in sizes if learner.ran(size, seconds(size))]


def _mixed(count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices([1, 2, 3, 4, 7, 8, 12, 16, 20, 32], k=count)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.2], ids=["as measured", "slower", "faster"])
def test_a_machine_that_is_faster_or_slower_changes_nothing(factor: float) -> None:
    learner = Learner(Tuning(FLAT, SIZES), 32)
    assert _serve(learner, lambda rows: factor * (1 + 0.1 * rows), _mixed(5000)) == []
    assert learner.target == 32


def test_noise_changes_nothing() -> None:
    even = {size: 0.1 * size for size in SIZES}
    learner = Learner(Tuning(even, SIZES), 4)
    noise = random.Random(2)
    assert _serve(learner, lambda rows: 0.1 * rows * noise.uniform(0.8, 1.3), _mixed(20_000)) == []


def test_a_size_that_is_slower_than_measured_is_left_once() -> None:
    learner = Learner(Tuning(FLAT, SIZES), 32)

    def seconds(rows: int) -> float:
        return (1 + 0.1 * rows) * (3 if rows > 16 else 1)

    assert _serve(learner, seconds, _mixed(5000)) == [16]


def test_it_takes_more_than_a_few_batches() -> None:
    learner = Learner(Tuning(FLAT, SIZES), 32)
    sizes = _mixed(LOOK * LOOKS - 1)
    assert _serve(learner, lambda rows: (1 + 0.1 * rows) * (3 if rows > 16 else 1), sizes) == []


def test_a_size_that_was_only_expected_to_be_best_is_left_if_it_is_not() -> None:
    """It was never run at warm-up: the line through 1 and 2 said so."""
    learner = Learner(Tuning({1: 10.0, 2: 10.0}, SIZES), 32)
    took = _serve(learner, lambda rows: 10.0 if rows <= 16 else 1000.0, [1, 32] * 300)
    assert took[-1] < 32


def test_with_one_size_only_nothing_is_concluded() -> None:
    learner = Learner(Tuning(FLAT, SIZES), 32)
    assert _serve(learner, lambda rows: 50.0, [32] * 2000) == []


def test_what_was_learnt_is_what_ran_often_enough() -> None:
    learner = Learner(Tuning(FLAT, SIZES), 32)
    assert not learner.has_learnt
    _serve(learner, lambda rows: 1 + 0.1 * rows, [8] * ENOUGH)
    assert learner.has_learnt
    assert learner.learnt().seconds == pytest.approx(FLAT)
