"""Rates and percentiles are differences between what workers said, and little of it is kept."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from inferq.workers.audit.audit import Mismatch
from inferq.workers.data_plane.counts import (
    PADDING,
    ROWS,
    SECONDS,
    Histogram,
    ModelStats,
    WorkerStats,
)
from inferq.workers.flower.figures import (
    NAMES,
    POINTS,
    SPACING_S,
    WINDOW_S,
    WORKERS,
    Batches,
    Figures,
    Missing,
    ModelRow,
)
from inferq.workers.flower.readings import MODELS, Reading
from inferq.workers.models.not_served import NotServed
from inferq.workers.queues.depths import Depth, Depths

HISTOGRAMS = ("queue_s", "compute_input_s", "compute_infer_s", "compute_output_s", "settle_s")


def histogram(bounds: tuple[float, ...], **counts: int) -> Histogram:
    """``b3=5``: five observations in bucket 3."""
    made = [0] * (len(bounds) + 1)
    for bucket, count in counts.items():
        made[int(bucket[1:])] = count
    return Histogram(made, 0.0)


def model(name: str = "m", *, done: int = 0, **given: Any) -> ModelStats:
    """What a worker says of a model with which `done` requests succeeded, each in 3 ms."""
    times: dict[str, Any] = {field: histogram(SECONDS) for field in HISTOGRAMS}
    return ModelStats(
        **{
            "model": name, "version": 1, "engine": "fake", "lanes": 2, "max_batch_size": 32,
            "target_batch_size": 8, "outcomes": {"success": done}, "errors": {}, "attempts": 0,
            "batches": 0, "rows": 0, "padding_rows": 0, "batch_size": histogram(ROWS),
            "padding": histogram(PADDING), "total_s": histogram(SECONDS, b5=done), "busy_s": 0.0,
            **times, **given,
        }
    )  # fmt: skip


def worker(at: float, *models: ModelStats, name: str = "w", **given: Any) -> WorkerStats:
    return WorkerStats(
        **{
            "incarnation": name, "node": f"{name}@h", "host": "h", "pid": 7, "started_at": 0.0,
            "at": at, "state": "serving", "redis_up": True, "device": "cpu", "versions": {},
            "gpu": None, "models": list(models), **given,
        }
    )  # fmt: skip


def depth(name: str, waiting: int = 0) -> Depth:
    return Depth(
        model=name,
        depth=waiting,
        by_priority={0: waiting, 9: 0},
        oldest_age_s=None,
        later=0,
        claimed=0,
        dead=0,
        consumers=1,
        max_queue_depth=10,
        near_limit=False,
    )


def reading(at: float, *stats: WorkerStats, depths: tuple[Depth, ...] = ()) -> Reading:
    return Reading(
        at=at, depths=Depths(models=depths, later_unread=0), foreign={}, stats=stats, left_out=0
    )


def see(figures: Figures, *readings: Reading) -> dict[str, ModelRow]:
    """The rows after the last of them."""
    for each in readings:
        page = figures.page(each, None, each.at)
    return {row.model: row for row in page.models}


def test_one_reading_says_what_is_and_not_how_fast() -> None:
    row = see(Figures(), reading(1.0, worker(1.0, model(done=1000)), depths=(depth("m", 3),)))["m"]
    assert (row.depth, row.limit, row.engines, row.rates) == (3, 10, ["fake"], None)
    assert row.by_priority == {"0": 3, "9": 0}
    assert (row.rate_points, row.depth_points) == ([], [3])


def test_rates_are_differences_between_what_a_worker_said() -> None:
    before = model(done=1000, batches=100, rows=2000, padding_rows=0, busy_s=10.0)
    after = model(
        done=1200,
        batches=150,
        rows=2300,
        padding_rows=100,
        busy_s=12.0,
        outcomes={"success": 1200, "failure": 10, "dead_letter": 2, "overtaken": 50},
        batch_size=histogram(ROWS, b0=20, b3=30),
    )
    after.batch_size.sum = 200.0
    for field, spent in zip(HISTOGRAMS, (4.0, 0.0, 1.0, 0.0, 0.5), strict=True):
        setattr(after, field, Histogram(histogram(SECONDS, b4=100).counts, spent))
    row = see(Figures(), reading(50.0, worker(7.0, before)), reading(52.0, worker(9.0, after)))["m"]
    rates = row.rates
    assert rates is not None
    assert rates.window_s == 2.0
    assert (rates.requests_per_s, rates.failures_per_s, rates.batches_per_s) == (106.0, 6.0, 25.0)
    assert (rates.mean_batch, rates.padding, rates.busy) == (4.0, 0.25, 0.5)
    assert rates.batches == [
        Batches(1, 1, 20),
        Batches(2, 2, 0),
        Batches(3, 4, 0),
        Batches(5, 8, 30),
    ]
    assert rates.p50_s is not None
    assert 0.002 < rates.p50_s < 0.005
    assert rates.split_s == {
        "queue": 0.04,
        "input": 0.0,
        "infer": 0.01,
        "output": 0.0,
        "settle": 0.005,
    }


def test_workers_of_one_model_are_summed_and_a_restarted_one_does_not_count_backwards() -> None:
    figures = Figures()
    see(figures, reading(0.0, worker(0.0, model(done=500)), worker(0.0, model(done=70), name="v")))
    rows = see(
        figures,
        reading(2.0, worker(2.0, model(done=600)), worker(2.0, model(done=90), name="v")),
    )
    assert rows["m"].rates is not None
    assert rows["m"].rates.requests_per_s == 60.0
    assert rows["m"].lanes == 4
    rows = see(figures, reading(4.0, worker(4.0, model(done=3), name="new")))
    assert rows["m"].rates is None
    rows = see(figures, reading(6.0, worker(6.0, model(done=23), name="new")))
    assert rows["m"].rates is not None
    assert rows["m"].rates.requests_per_s == 10.0


def test_rates_are_of_the_last_seconds_and_what_is_kept_is_bounded() -> None:
    figures = Figures()
    for second in range(0, 600, 2):
        done = 100 * second if second < 300 else 30_000 + 7 * (second - 300)
        stats = worker(float(second), model(done=done))
        rows = see(figures, reading(float(second), stats, depths=(depth("m"),)))
    rates = rows["m"].rates
    assert rates is not None
    assert rates.requests_per_s == pytest.approx(7.0)
    assert WINDOW_S - SPACING_S <= rates.window_s <= WINDOW_S
    assert len(rows["m"].rate_points) == len(rows["m"].depth_points) == POINTS
    (known,) = figures._known.values()
    assert len(known.earlier) <= WINDOW_S / SPACING_S + 2
    crowd = [worker(600.0, model(), name=f"w{n}") for n in range(WORKERS + 5)]
    page = figures.page(reading(600.0, *crowd), None, 600.0)
    assert len(page.workers) == len(figures._known) == WORKERS
    assert page.notes == ["5 more workers are not shown."]
    many = worker(602.0, *(model(f"m{n}") for n in range(MODELS + 3)), name="many")
    page = figures.page(reading(602.0, many, depths=(depth("m0"), depth("other"))), None, 602.0)
    assert len(page.models) == len(figures._courses) == MODELS
    assert page.notes == ["4 more models that workers serve are not shown."]
    see(figures, reading(604.0))
    assert not figures._known
    assert not figures._courses


@pytest.mark.parametrize("jump", [WINDOW_S + 2, 3600.0, -3600.0])
def test_after_a_long_time_unseen_or_a_clock_that_jumps_rates_begin_anew(jump: float) -> None:
    figures = Figures()
    see(figures, reading(0.0, worker(10_000.0, model())))
    see(figures, reading(2.0, worker(10_002.0, model(done=20))))
    later = 10_002.0 + jump
    seen = see(figures, reading(30.0, worker(later, model(done=900))))
    assert seen["m"].rates is None
    seen = see(figures, reading(32.0, worker(later + 2, model(done=1000))))
    rates = seen["m"].rates
    assert rates is not None
    assert (rates.window_s, rates.requests_per_s) == (2.0, 50.0)


def test_what_does_not_fit_or_goes_backwards_is_passed_over() -> None:
    figures = Figures()
    hostile = model("<b>", done=5, total_s=Histogram([1, 2], float("nan")), lanes=0)
    see(figures, reading(0.0, worker(5.0, model("<b>", done=9))))
    rates = see(figures, reading(2.0, worker(7.0, hostile)))["<b>"].rates
    assert rates is not None
    assert (rates.requests_per_s, rates.p50_s, rates.busy) == (0.0, None, 0.0)
    assert see(figures, reading(4.0, worker(1.0, hostile)))["<b>"].rates is None
    page = figures.page(reading(6.0, worker(9.0, hostile, gpu={"index": float("inf")})), None, 6.0)
    assert b"null" in msgspec.json.encode(page)


def test_an_old_reading_says_how_old_it_is_and_a_silent_worker_for_how_long() -> None:
    figures = Figures()
    told = worker(3.0, model())
    assert figures.page(None, "Redis: away", 9.0).age_s is None
    figures.page(reading(10.0, told), None, 10.0)
    page = figures.page(reading(18.0, told), "Redis: away", 21.5)
    assert (page.age_s, page.problem) == (3.5, "Redis: away")
    assert page.workers[0].silent_s == 8.0


def test_what_workers_do_not_serve_is_told_once_with_all_who_say_so() -> None:
    broken, half = NotServed("b", "is no model"), NotServed("a", "is cut off", 2)
    figures = Figures()
    page = figures.page(
        reading(
            1.0,
            worker(1.0, name="w", not_served=[broken, half], passed_over=["docs"]),
            worker(1.0, name="v", not_served=[broken], passed_over=["docs", "data"]),
            worker(1.0, name="u"),
        ),
        None,
        1.0,
    )
    assert page.not_served == [
        Missing(model="a", version=2, reason="is cut off", nodes=["w@h"]),
        Missing(model="b", version=None, reason="is no model", nodes=["w@h", "v@h"]),
    ]
    assert page.notes == ["Folders passed over, as they hold no model: data, docs."]
    gone = figures.page(reading(2.0, worker(2.0, name="u")), None, 2.0)
    assert (gone.not_served, gone.notes) == ([], [])


def test_of_very_many_that_are_not_served_some_are_left_out_and_counted() -> None:
    missing = [NotServed(f"m{n:04}", "is no model") for n in range(MODELS + 7)]
    folders = [f"d{n:02}" for n in range(NAMES + 3)]
    page = Figures().page(
        reading(1.0, worker(1.0, not_served=missing, passed_over=folders)), None, 1.0
    )
    assert len(page.not_served) == MODELS
    assert "7 more models that are not served are not shown." in page.notes
    assert any(note.endswith("d19 and 3 more.") for note in page.notes)


def test_a_model_that_an_audit_found_out_says_what_was_seen() -> None:
    wrong = Mismatch("output 'y' differs by 0.19 of values up to 10", 32, 100)
    found = model("m", mismatch=wrong, unbatched=True)
    row = see(Figures(), reading(1.0, worker(1.0, model("m")), worker(1.0, found, name="v")))["m"]
    assert row.mismatch is not None
    assert "differs by 0.19 of values up to 10 in one of 32 rows" in row.mismatch
    assert row.unbatched
    row = see(Figures(), reading(1.0, worker(1.0, model("m"))))["m"]
    assert (row.mismatch, row.unbatched) == (None, False)
