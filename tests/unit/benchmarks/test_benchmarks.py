"""`make bench` counts right and writes what it promises; measuring is a run of its own."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from benchmarks import noop, report
from benchmarks.ceiling import Way, example_rows, measure_ceiling
from benchmarks.harness import Sample, interleave, measure, medians
from helpers.onnx_models import double
from rich.console import Console

SERVED = {"rps": 90.0, "efficiency": 0.9, "p50_ms": 5.0, "p99_ms": 9.0}
MODEL = {
    "efficiency": 0.9,
    "ceiling_rps": 100.0,
    "ceilings": {"shared-session, batch 2": 100.0},
    "served": {"16": SERVED, "64": SERVED},
}
LATENCY = {
    "inferq": {"p50_ms": 1.0, "p99_ms": 2.0},
    "celery solo": {"p50_ms": 4.0, "p99_ms": 8.0},
    "p50_ratio": 0.25,
    "p99_ratio": 0.25,
}
#: Requests/s of each system; prefork read by `get_many` is the best of plain Celery at 3 KB.
RPS = {
    "inferq 1": 2_000, "inferq 8": 10_000, "inferq 32": 20_000, "inferq 128": 22_000,
    "inferq 150k": 1_500,
    "celery solo get": 700, "celery solo get_many": 800, "celery solo get 150k": 250,
    "celery solo get_many 150k": 240,
    "celery prefork get": 750, "celery prefork get_many": 1_000, "celery prefork get 150k": 200,
    "celery prefork get_many 150k": 200,
    "celery-batches 32": 5_000,
}  # fmt: skip


def sample(rps: float) -> Sample:
    return Sample(rps, producer_us=10.0, worker_us=20.0, redis_us=30.0)


def figures() -> report.Figures:
    measured = noop.summarise({name: sample(rps) for name, rps in RPS.items()})
    return {**measured, "latency": LATENCY, "models": {"magika": MODEL}}


def test_a_ratio_is_to_the_best_pool_and_reading_of_plain_celery() -> None:
    """And to the one of the same payload; celery-batches is not plain Celery."""
    measured = figures()
    assert measured["noop"]["32"]["ratio_plain_celery"] == pytest.approx(20.0)
    assert measured["payload_150k"]["ratio_plain_celery"] == pytest.approx(6.0)
    assert measured["noop"]["1"]["cpu_us"]["total"] == pytest.approx(60.0)


def test_everything_measured_is_written(tmp_path: Path) -> None:
    measured = figures()
    report.write_json(measured, tmp_path / "bench.json")
    report.write_picture(measured, tmp_path / "bench.png")
    read = json.loads((tmp_path / "bench.json").read_text())
    assert read == measured
    assert read["noop"].keys() == {"1", "8", "32", "128"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_show_every_system_uncut() -> None:
    log = io.StringIO()
    report.print_tables(figures(), Console(width=110, file=log))
    text = log.getvalue()
    for shown in ("inferq, batch 128", "celery prefork get_many 150k", "shared-session, batch 2"):
        assert shown in text
    assert "…" not in text


def test_cpu_time_is_that_of_the_process_which_spent_it() -> None:
    """200 ms of work here for 100 requests are 2 ms each; what only waits has used next to none."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as idle:

        def work() -> None:
            until = time.process_time() + 0.2
            while time.process_time() < until:
                pass

        found = measure(work, 100, worker=idle.pid, redis=idle.pid)
    assert found.producer_us >= 2_000
    assert found.worker_us < 1_000
    assert found.redis_us < 1_000


def test_every_system_runs_once_in_every_round() -> None:
    ran: list[str] = []

    def run(name: str) -> str:
        ran.append(name)
        return name

    results = interleave({name: partial(run, name) for name in "abc"}, 4)
    assert results == {"a": ["a"] * 4, "b": ["b"] * 4, "c": ["c"] * 4}
    assert [sorted(ran[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4


@pytest.mark.parametrize(("rps", "expected"), [([3, 1, 2], 2), ([1, 2, 3, 4], 2.5)])
def test_a_figure_is_the_median_of_its_rounds(rps: Sequence[float], expected: float) -> None:
    assert medians([sample(each) for each in rps]).rps == pytest.approx(expected)


def test_the_ceiling_of_a_model_is_measured_in_its_own_process(tmp_path: Path) -> None:
    model = double(tmp_path / "model.onnx")
    assert {name: a.shape for name, a in example_rows(model, 5).items()} == {"x": (5, 3)}
    assert measure_ceiling(model, Way("shared-session", 4), 0.2) > 0


def test_a_ceiling_that_cannot_be_measured_says_why(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"model\.onnx \(shared-session, batch 4\)"):
        measure_ceiling(tmp_path / "model.onnx", Way("shared-session", 4), 0.2)
