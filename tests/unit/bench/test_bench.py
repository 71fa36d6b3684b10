"""What `inferq bench` counts, when it sends, and what it makes of it; no worker is needed."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from inferq.shared.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InferqError,
    InvalidInput,
    ResultTimeout,
)
from inferq.shared.schema import Array, ModelAdvert, Receipt, Signature, TensorSpec
from inferq.workers.bench import arrays, compare, figures, loads
from inferq.workers.bench.figures import Report, StepFigures, WindowFigures
from inferq.workers.bench.histogram import Histogram
from inferq.workers.bench.messages import packed, unpacked
from inferq.workers.bench.tally import Tally

# --- counting ---------------------------------------------------------------------------------


def _histogram(values: Any) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(float(value))
    return histogram


@pytest.mark.parametrize("percent", [1, 50, 90, 95, 99, 99.9])
def test_a_percentile_is_right_to_half_a_percent(percent: float) -> None:
    values = np.random.default_rng(1).lognormal(-5, 1.5, 20_000)
    exact = np.sort(values)[math.ceil(len(values) * percent / 100) - 1]
    assert _histogram(values).percentile(percent) == pytest.approx(exact, rel=0.0051)


def test_the_ends_of_a_histogram_are_exact() -> None:
    histogram = _histogram([0.0, 1e-9, 0.25, 7200.0])
    assert (histogram.least, histogram.percentile(100), histogram.most) == (0.0, 7200.0, 7200.0)
    assert _histogram([0.123]).percentile(50) == 0.123
    assert (Histogram().percentile(99), Histogram().mean) == (0.0, 0.0)


def _receipt(**given: Any) -> Receipt:
    fields: dict[str, Any] = {
        "queue_ms": 2.0, "form_ms": 1.0, "compute_ms": 5.0, "settle_ms": 0.5, "batch_size": 6,
        "padding": 2, "requests": 3, "worker": "w", "engine": "fake", "model": "m", "version": 1,
        "attempt": 1, **given,
    }  # fmt: skip
    return Receipt(**fields)


def _tallies(parts: int) -> tuple[Tally, Tally]:
    """The same 3,000 outcomes counted by one process, and by `parts` of them and then merged."""
    random = np.random.default_rng(2)
    whole, shares = Tally(), [Tally() for _ in range(parts)]
    for number in range(3_000):
        latency = float(random.integers(1, 2**20)) / 2**20  # sums of such floats are exact
        for tally in (whole, shares[int(random.integers(parts))]):
            tally.sent += 1
            tally.late.add(latency / 2)
            if number % 10 == 0:
                tally.fail(EngineError("x"), latency)
            elif number % 31 == 0:
                tally.fail(DeadlineExceeded("x"), latency)
            elif number % 37 == 0:
                tally.abandon(latency)
            else:
                tally.succeed(_receipt(requests=4, worker=f"w{number % 3}"), 0.0, latency)
    merged = Tally()
    for share in shares:
        merged.merge(msgspec.msgpack.decode(msgspec.msgpack.encode(share), type=Tally))
    return whole, merged


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_what_several_processes_counted_merges_to_what_one_would_have(parts: int) -> None:
    whole, merged = _tallies(parts)
    assert merged == whole
    assert whole.sent == whole.succeeded + whole.failed + whole.unanswered == 3_000


def test_what_ran_out_of_time_counts_as_long_as_was_waited_and_other_errors_do_not() -> None:
    tally = Tally()
    tally.fail(DeadlineExceeded("x"), 9.0)
    tally.fail(ResultTimeout("x"), 8.0)
    tally.fail(EngineError("x"), 7.0)
    tally.abandon(10.0)
    assert (tally.latency.total, tally.latency.least, tally.latency.most) == (3, 8.0, 10.0)
    assert tally.errors == {"deadline_exceeded": 1, "result_timeout": 1, "engine_error": 1}


@pytest.mark.parametrize(("queue_ms", "counted"), [(40.0, 12.5), (-3.0, 0.0)])
def test_a_wait_that_clocks_made_too_long_is_cut(queue_ms: float, counted: float) -> None:
    tally = Tally()
    tally.succeed(_receipt(queue_ms=queue_ms), 0.001, 0.020)
    assert tally.split.queue == pytest.approx(counted)
    assert tally.split.other == pytest.approx(12.5 - counted)


def test_the_parts_of_the_time_add_up_to_the_mean_latency() -> None:
    tally = Tally()
    tally.succeed(_receipt(), 0.001, 0.020)
    tally.succeed(_receipt(queue_ms=None, compute_ms=9.0), 0.003, 0.040)
    times = figures.times(tally.split)
    latency = figures.percentiles(tally.latency)
    assert times is not None
    assert latency is not None
    assert sum(msgspec.structs.astuple(times)) == pytest.approx(latency.mean) == 30.0
    assert (times.late, times.queue, times.compute) == (2.0, 1.0, 7.0)


def test_a_batch_counts_once_however_many_requests_were_in_it() -> None:
    tally = Tally()
    for _ in range(3):
        tally.succeed(_receipt(requests=3, batch_size=6, padding=2), 0, 0.01)
    tally.succeed(_receipt(requests=1, batch_size=2, padding=0), 0, 0.01)
    assert figures.batches(tally.split) == figures.BatchFigures(4.0, 1.0)


@pytest.mark.parametrize(
    ("throughputs", "p95s", "stable"),
    [
        ([100, 100], [5, 5], False),
        ([100, 109, 100], [5, 5, 5], True),
        ([100, 130, 100], [5, 5, 5], False),
        ([100, 100, 100], [5, 7, 5], False),
        ([10, 100, 100, 100], [50, 5, 5, 5], True),
        ([0, 0, 0], [0, 0, 0], False),
    ],
)
def test_stable_is_when_the_last_three_windows_agree(
    throughputs: list[float], p95s: list[float], stable: bool
) -> None:
    windows = [WindowFigures(t, p) for t, p in zip(throughputs, p95s, strict=True)]
    assert figures.is_stable(windows) is stable


# --- what to send -----------------------------------------------------------------------------


def _advert(*inputs: TensorSpec, batchable: bool = True, **given: Any) -> ModelAdvert:
    batch = TensorSpec("y", "float32", ("batch",))
    fields: dict[str, Any] = {
        "name": "m", "version": 1, "engine": "fake", "signature": Signature(inputs, (batch,)),
        "max_batch_size": 8, "batchable": batchable, "max_queue_depth": 0,
        "max_request_bytes": 10_000, "default_priority": 0, "default_timeout_ms": 0,
        "seconds_per_row": 0.0, **given,
    }  # fmt: skip
    return ModelAdvert(**fields)


IMAGE = TensorSpec("x", "uint8", ("batch", "h", "w", 3))
MASK = TensorSpec("mask", "bool", ("batch", "h", "w"))


def test_inputs_are_made_by_the_signature_and_dims_of_the_same_name_agree() -> None:
    advert = _advert(IMAGE, MASK, TensorSpec("t", "int64", ("batch",)))
    items = arrays.made(advert, {"x": (2, 5, 4, 3)}, None, "random", 0)
    assert arrays.check(advert, items) == 2
    assert {name: array.shape for name, array in items[0].items()} == {
        "x": (2, 5, 4, 3),
        "mask": (2, 5, 4),
        "t": (2,),
    }
    assert len(items) == arrays.DISTINCT
    assert not np.array_equal(items[0]["x"], items[1]["x"])


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float16", "complex64"])
@pytest.mark.parametrize("data", ["random", "zeros"])
def test_every_kind_of_dtype_can_be_made(dtype: str, data: arrays.Data) -> None:
    advert = _advert(TensorSpec("x", dtype, ("batch", 100)))
    items = arrays.made(advert, {}, 3, data, 0)
    assert arrays.check(advert, items) == 3
    assert items[0]["x"].dtype == np.dtype(dtype)
    assert bool(items[0]["x"].any()) is (data == "random")


@pytest.mark.parametrize(
    ("shapes", "batch", "expected"),
    [
        ({}, None, "dim 1 of x: uint8[batch, h, w, 3] is open; expected --shape x=batch,h,w,3"),
        ({"z": (1,)}, None, "--shape z: model 'm' has no such input; expected one of x, mask"),
        ({"x": (1, 2)}, None, "--shape x: 2 dims; expected those of x: uint8[batch, h, w, 3]"),
        ({"x": (1, 2, 2, 4)}, None, "--shape x: 4; expected 3"),
        ({"x": (1, 2, 2, 3), "mask": (1, 9, 2)}, None, "--shape mask: h is 9; expected 2"),
        ({"x": (1, 2, 2, 3)}, 4, "--batch 4; expected 1, the rows of --shape"),
        ({"x": (1, 90, 90, 3)}, None, "would be 32400 bytes; expected at most 10000"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(
    shapes: dict[str, tuple[int, ...]], batch: int | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        arrays.made(_advert(IMAGE, MASK), shapes, batch, "zeros", 0)


def test_a_model_without_batches_takes_no_batch() -> None:
    advert = _advert(TensorSpec("x", "float32", (3,)), batchable=False)
    assert arrays.check(advert, arrays.made(advert, {}, None, "zeros", 0)) == 1
    with pytest.raises(ConfigError, match="--batch 2: model 'm' takes no batches"):
        arrays.made(advert, {}, 2, "zeros", 0)


@pytest.mark.parametrize("text", ["x", "x=", "=1", "x=1,,2", "x=0", "x=-1", "x=1.5", "x=a"])
def test_a_bad_shape_says_what_was_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--shape {text!r}; expected NAME=SIZE")):
        arrays.read_shapes([text])


@pytest.mark.parametrize(("dtype", "kind"), [("string", str), ("bytes", bytes)])
@pytest.mark.parametrize("data", ["random", "zeros"])
def test_text_can_be_made_and_travels_to_a_process(
    dtype: str, kind: type, data: arrays.Data
) -> None:
    advert = _advert(TensorSpec("x", dtype, ("batch", 10)))
    items = arrays.made(advert, {}, 3, data, 0)
    assert arrays.check(advert, items) == 3
    assert {*map(type, items[0]["x"].flat)} == {kind}
    zeros = {"0", b"0"}.issuperset(items[0]["x"].flat)
    assert zeros is (data == "zeros")
    (back, *_) = unpacked(packed(items))
    assert back["x"].tolist() == items[0]["x"].tolist()


def test_files_of_numpys_own_strings_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array(["a", "bcd"]))
    advert = _advert(TensorSpec("x", "string", ("batch",)))
    items = arrays.read(advert, [str(tmp_path / "in.npz")], 1)
    assert [item["x"].tolist() for item in items] == [["a"], ["bcd"]]


def test_files_are_cut_into_requests(tmp_path: Path) -> None:
    advert = _advert(TensorSpec("x", "float32", ("batch", 2)), TensorSpec("t", "int8", ("batch",)))
    x, t = np.arange(10, dtype=np.float32).reshape(5, 2), np.arange(5, dtype=np.int8)
    np.savez(tmp_path / "in.npz", x=x)
    np.save(tmp_path / "t.npy", t)
    given = [str(tmp_path / "in.npz"), f"t={tmp_path / 't.npy'}"]
    items = arrays.read(advert, given, 2)
    assert arrays.check(advert, items) == 2
    assert [item["t"].tolist() for item in items] == [[0, 1], [2, 3]]
    (whole,) = arrays.read(advert, given, None)
    assert whole["x"].tolist() == x.tolist()
    with pytest.raises(ConfigError, match="--batch 6: --input has 5 rows"):
        arrays.read(advert, given, 6)
    with pytest.raises(ConfigError, match="'t' is given twice"):
        arrays.read(advert, [given[1], given[1]], None)
    with pytest.raises(InvalidInput, match="missing 't'"):
        arrays.read(advert, given[:1], None)


def test_arrays_travel_to_a_process_as_they_are() -> None:
    items: list[dict[str, Array]] = [
        {"x": np.arange(6, dtype=np.int16).reshape(2, 3).T, "s": np.array(3.0, np.float32)}
    ]
    (back,) = unpacked(packed(items))
    assert back["x"].tolist() == items[0]["x"].tolist()
    assert back["x"].dtype == np.dtype(np.int16)
    assert back["s"].shape == ()
    assert back["s"].dtype == np.dtype(np.float32)


# --- what it came to --------------------------------------------------------------------------


def _step(load: float, factor: float = 1.0, *, stable: bool = True) -> StepFigures:
    latency = figures.Percentiles(*(factor * ms for ms in (11.0, 10.0, 14.0, 15.0, 20.0, 40.0)))
    counts = figures.Counts(100, 100, 100, 0, 0, 0, 0)
    return StepFigures(
        load=load,
        stable=stable,
        seconds=6.0,
        requests_per_s=50 * load,
        rows_per_s=50 * load,
        latency_ms=latency,
        late_ms=latency,
        counts=counts,
        errors={},
        whole=counts,
        time_ms=figures.Times(0.1, 3.0 * factor, 1.0, 5.0, 0.5, 1.4),
        gpu_ms=None,
        batch=figures.BatchFigures(2.0, 0.0),
        attempted_again=0,
        generator_cpu_us=120.0,
        workers=["w"],
        engines=["fake, version 1"],
        windows=[WindowFigures(50.0, 15.0)],
        notes=[],
    )


def _report(*steps: StepFigures, kind: loads.Kind = "concurrency", model: str = "m") -> Report:
    return Report(
        model=model,
        version=1,
        engine="fake",
        max_batch_size=8,
        began_at="2026-01-01T00:00:00+00:00",
        versions={"inferq": "0.1.0", "python": "3.11", "numpy": "2", "server": "valkey 9"},
        host="h",
        cores=2,
        how=figures.How(
            kind=kind,
            distribution=None,
            processes=1,
            window_s=2.0,
            max_windows=10,
            warmup_s=1.0,
            max_in_flight=4096,
            timeout_s=60.0,
            seed=0,
        ),
        request=figures.Request(
            rows=1,
            bytes=16,
            inputs=[figures.InputFigures("x", "float32", [1, 4])],
            data="random",
            priority=None,
            timeout_ms=None,
        ),
        interrupted=False,
        steps=list(steps),
    )


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = _report(_step(1), _step(2, stable=False))
    (tmp_path / "old.json").write_bytes(msgspec.json.encode(report))
    assert figures.read_report(tmp_path / "old.json") == report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is no report of inferq bench"),
        ("[]", "is no report of inferq bench"),
        ('{"format": "else", "format_version": 1}', "is no report of inferq bench"),
        ('{"format": "inferq-bench", "format_version": 1}', "is no report of inferq bench"),
        ('{"format": "inferq-bench", "format_version": 2}', "format_version 2; expected 1"),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        figures.read_report(tmp_path / "old.json")


def test_a_comparison_is_of_the_loads_that_both_have() -> None:
    newer, older = _report(_step(1), _step(4, 2.0), _step(8)), _report(_step(4), model="n")
    (ratio,) = compare.ratios(newer, older)
    assert (ratio.load, ratio.p50, ratio.p99, ratio.queue) == (4, 2.0, 2.0, 2.0)
    assert (ratio.requests_per_s, ratio.compute) == (1.0, 1.0)
    assert compare.differences(newer, older) == [
        "model: n before, m now",
        "not measured before: 1, 8",
    ]


def test_a_closed_loop_is_not_compared_with_an_open_one() -> None:
    with pytest.raises(ConfigError, match=r"old\.json is of a run by rate; expected one by conc"):
        compare.check_comparable(_report(kind="rate"), "concurrency", "old.json")


@pytest.fixture
def drawn() -> Iterator[Any]:
    """`inferq.workers.bench.plot`, whose Figure is kept: ``drawn.figure``."""
    plot = pytest.importorskip("inferq.workers.bench.plot")
    with pytest.MonkeyPatch.context() as patch:

        class Kept(plot.Figure):  # type: ignore[misc, name-defined]
            def __init__(self, *args: Any, **given: Any) -> None:
                super().__init__(*args, **given)
                plot.figure = self

        patch.setattr(plot, "Figure", Kept)
        yield plot


def test_a_picture_names_model_units_loads_and_versions(drawn: Any) -> None:
    report = _report(_step(1), _step(2, stable=False), _step(4, 30.0))
    png = drawn.draw(report, _report(_step(2)))
    assert png.startswith(b"\x89PNG")
    assert len(png) < 300_000
    curves, bars = drawn.figure.axes
    assert "m version 1 on fake" in drawn.figure.get_suptitle()
    assert "inferq 0.1.0" in drawn.figure.get_supxlabel()
    assert "2026-01-01" in drawn.figure.get_supxlabel()
    assert curves.get_xlabel() == "throughput, requests/s"
    assert curves.get_ylabel().endswith("ms")
    assert curves.get_yscale() == "log"
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert {"p50", "p95", "p99", "p99 before"} <= set(names)
    assert [text.get_text() for text in curves.texts] == ["1", "2*", "4"]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["1", "2*", "4"]
    assert len(bars.get_legend().get_texts()) == 6


@pytest.mark.parametrize("steps", [[], [3.0], [float(n) for n in range(1, 101)]])
def test_a_picture_can_be_drawn_of_no_step_one_and_a_hundred(
    drawn: Any, steps: list[float]
) -> None:
    assert drawn.draw(_report(*map(_step, steps))).startswith(b"\x89PNG")


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from inferq.workers.cli import main
sys.argv = ["inferq", "bench", "m", "--redis-url", "redis://127.0.0.1:1/0", "--plot", "x.png"]
main()
"""


def test_without_matplotlib_a_picture_names_the_extra_before_anything_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert done.stderr == (
        "inferq: matplotlib is not installed; expected: pip install 'inferq[bench]'\n"
    )


def test_errors_are_counted_by_code_of_every_class() -> None:
    tally = Tally()
    tally.fail(InferqError("x"), 1.0)
    assert tally.errors == {"error": 1}
