"""`make gpu` can fail: what it holds against the answers, its threads, its report. No GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import together as threads
from gpu.checks import APART, Expected, WrongAnswers, choose, picture
from gpu.together import Turns, together
from helpers.fakecuda import environment

from inferq.shared.schema import Array

HELPERS = Path(__file__).parents[2] / "helpers"
CASES = re.findall(
    r"^def ([a-z]\w*)\(\) -> None", (HELPERS / "make_gpu_cases.py").read_text(), re.MULTILINE
)
LIMIT = 0.05


# --- answers -------------------------------------------------------------------------------------


def _chosen(answers: Array) -> Expected:
    rows: list[dict[str, Array]] = [{"x": np.full((1, 1), n)} for n in range(len(answers))]
    return choose("m", rows, {"y": answers.astype(np.float32)}, LIMIT)


@pytest.fixture
def expected() -> Expected:
    return _chosen(np.random.default_rng(0).uniform(-1, 1, (32, 20)))


def test_right_answers_with_rounding_pass(expected: Expected) -> None:
    _, right = expected.batch(8, 8, seed=1)
    given = {"y": right["y"] + np.float32(0.6 * LIMIT)}
    assert 0 < expected.check(given, right) <= LIMIT


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y[[1, 0, 2, 3, 4, 5, 6, 7]],
        lambda y: y[[0, 1, 2, 3, 4, 5, 7, 6]],
        lambda y: np.roll(y, 1, axis=0),
        lambda y: np.repeat(y[:1], 8, axis=0),
        lambda y: np.concatenate([y[:4], y[:4]]),
        lambda y: y * np.float32(1 - 2 * LIMIT),
        lambda y: np.full_like(y, np.nan),
    ],
    ids=["swapped", "the last two", "shifted", "one for all", "halves", "scaled", "no numbers"],
)
def test_a_row_in_anothers_place_is_found(expected: Expected, wrong: Any) -> None:
    for seed in range(20):
        _, right = expected.batch(8, 8, seed)
        with pytest.raises(WrongAnswers, match="answers differ by"):
            expected.check({"y": wrong(right["y"])}, right)


def test_another_shape_or_dtype_is_found(expected: Expected) -> None:
    _, right = expected.batch(8, 8, seed=1)
    for given in (right["y"][:1], right["y"].astype(np.float64)):
        with pytest.raises(WrongAnswers, match=r"output 'y' is float.*; expected float32\[8, 20\]"):
            expected.check({"y": given}, right)


def test_inputs_whose_answers_hardly_differ_are_refused() -> None:
    alike = 1 + 0.5 * LIMIT * np.random.default_rng(0).uniform(-1, 1, (32, 20))
    with pytest.raises(WrongAnswers, match=r"1 inputs of model 'm' have answers that are apart by"):
        _chosen(alike)


def test_a_check_that_would_let_a_swapped_row_pass_says_so() -> None:
    alike = 1 + 0.5 * LIMIT * np.random.default_rng(0).uniform(-1, 1, (4, 20))
    answers = {"y": alike.astype(np.float32)}
    unchecked = Expected([{"x": np.zeros((1, 1))}] * 4, answers, {"y": 1.0}, LIMIT)
    _, right = unchecked.batch(4, 4, seed=0)
    with pytest.raises(WrongAnswers, match="rows 0 and 1 in each other's place would not be found"):
        unchecked.check(right, right)


def test_neighbours_are_never_alike_and_all_rows_are_sent(expected: Expected) -> None:
    order = expected.order(2000, seed=3)
    assert all(a != b for a, b in pairwise(order))
    assert set(order) == set(range(len(expected.rows)))


def test_the_large_model_tells_pictures_apart() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from gpu.models import served_resnet50  # noqa: PLC0415 - it needs PyTorch

    rng = np.random.default_rng(0)
    pictures = np.stack([picture(rng, 224) for _ in range(12)])
    model = served_resnet50()
    with torch.inference_mode():
        scores = model(torch.from_numpy(pictures))["scores"].numpy()
        half = model.half()(torch.from_numpy(pictures[:4]))["scores"].numpy()
    rows: list[dict[str, Array]] = [{"image": each[None]} for each in pictures]
    assert pictures[0].nbytes == 150_528
    assert len(choose("resnet50", rows, {"scores": scores}, LIMIT).rows) >= 6
    # And rounding stays far below what passes.
    assert half.dtype == np.float32
    assert np.abs(half - scores[:4]).max() < LIMIT * np.abs(scores).max() / APART


# --- threads -------------------------------------------------------------------------------------


def test_what_one_lane_raises_ends_all_and_is_raised() -> None:
    rounds = [0, 0]

    def works(turns: Turns) -> None:
        turns.one_by_one(lambda: None)
        while turns.on:
            rounds[0] += 1
            time.sleep(0.001)

    def fails(turns: Turns) -> None:
        turns.one_by_one(lambda: None)
        rounds[1] += 1
        raise ValueError("an illegal address")

    with pytest.raises(ValueError, match="an illegal address"):
        together([works, fails], 60)
    assert rounds[1] == 1


def test_a_lane_that_fails_while_it_warms_up_lets_nobody_wait() -> None:
    measured = threading.Event()

    def works(turns: Turns) -> None:
        turns.one_by_one(lambda: None)
        measured.set()

    def fails(turns: Turns) -> None:
        def warm() -> None:
            raise ValueError("no memory")

        turns.one_by_one(warm)

    with pytest.raises(ValueError, match="no memory"):
        together([works, fails, works], 60)
    assert not measured.is_set()


def test_lanes_warm_up_one_after_another_and_begin_together() -> None:
    inside, most, warm, seen = 0, 0, 0, []

    def lane(turns: Turns) -> None:
        def warms() -> None:
            nonlocal inside, most, warm
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            inside -= 1
            warm += 1

        turns.one_by_one(warms)
        seen.append(warm)

    together([lane] * 4, 60)
    assert (most, seen) == (1, [4] * 4)


def test_a_lane_that_hangs_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "READY_WITHIN_S", 0.05)
    monkeypatch.setattr(threads, "ENDED_WITHIN_S", 0.05)
    free = threading.Event()

    def hangs(_: Turns) -> None:
        free.wait(60)

    with pytest.raises(TimeoutError, match="a lane did not end"):
        together([hangs], 0)
    free.set()


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_report_on_the_fake_driver(fake_driver: Path, tmp_path: Path, case: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "helpers.make_gpu_cases", case, tmp_path],
        env=environment(fake_driver),
        cwd=HELPERS.parent,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_cases_were_found() -> None:
    assert len(CASES) == 5
