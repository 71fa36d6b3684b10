"""Warm-up runs every size on every lane, as far as memory and time allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array
from inferq.workers.models.engine import Batch, Lane
from inferq.workers.models.lane_threads import LaneThreads
from inferq.workers.warmup import runs
from inferq.workers.warmup.cache import Cache
from inferq.workers.warmup.forecast import Forecast
from inferq.workers.warmup.limits import Limit, Usage
from inferq.workers.warmup.notes import Notes
from inferq.workers.warmup.runs import Runs, Warmed

SIZES = [1, 2, 4, 8, 16, 32]
MB = 1_000_000


class Timed(Lane):
    """A lane whose runs take what `seconds` says of a batch's size."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds
        self.ran: list[int] = []
        self.threads: set[int] = set()

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.ran.append(batch.bucket)
        self.threads.add(threading.get_ident())
        time.sleep(self._seconds(batch.bucket))
        return {"y": np.zeros((batch.rows, 3), np.float32)}


class Memory:
    """A process that takes `per_row` for each row that runs at once, and keeps it."""

    def __init__(self, limit: int, per_row: int, base: int = 100 * MB) -> None:
        self.taken = base
        self._base, self._limit, self._per_row = base, limit, per_row
        self._lock = threading.Lock()
        self._rows = 0
        self.killed = False

    def run(self, rows: int) -> None:
        with self._lock:
            self._rows += rows
            self.taken = max(self.taken, self._base + self._per_row * self._rows)
            self.killed = self.killed or self.taken > self._limit
        time.sleep(0.03)  # so that lanes that run together do, on a busy machine, too
        with self._lock:
            self._rows -= rows

    def forecast(self) -> Forecast:
        def read() -> Usage:
            return Usage(self.taken, self.taken, 0, 0)

        def left() -> list[Limit]:
            return [Limit("the cgroup /x", self._limit, self.taken)]

        return Forecast(read, left, lambda: None)


class Growing(Lane):
    """A lane that takes `memory`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.ran: list[int] = []

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.ran.append(batch.bucket)
        self._memory.run(batch.bucket)
        return {"y": np.zeros((batch.rows, 3), np.float32)}


def _make(size: int, buckets: Sequence[int] = ()) -> Batch:
    bucket = next((bucket for bucket in buckets if bucket >= size), size)
    return Batch([{"x": np.zeros((size, 3), np.float32)}], size, bucket)


def _run(lanes: Sequence[Lane], sizes: Sequence[int], **given: Any) -> Warmed:
    given.setdefault("forecast", Forecast(left=list))
    threads = LaneThreads("m")
    try:
        return Runs("m", lanes, threads, given.pop("make", _make), sizes, **given).run()
    finally:
        threads.end()


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
    tuning = _run(lanes, [1, 2, 4, 8]).tuning
    assert tuning.best == best
    assert 0.5 < tuning.seconds_per_row / (seconds(best) / best / len(lanes)) < 2


@pytest.mark.parametrize("count", [1, 3])
def test_every_lane_has_run_every_size_before_the_first_request(count: int) -> None:
    lanes = [Timed(lambda rows: 0.0005 * rows**2) for _ in range(count)]
    _run(lanes, SIZES)
    for lane in lanes:
        assert set(lane.ran) == set(SIZES)


def test_every_lane_runs_every_size_where_nothing_needs_to_be_measured() -> None:
    lanes = [Timed(lambda rows: 0.001 * rows) for _ in range(2)]
    known = {size: 0.001 * size for size in SIZES}
    tuning = _run(lanes, SIZES, known=known).tuning
    assert tuning.seconds == known
    for lane in lanes:
        assert set(lane.ran) == set(SIZES)
        assert len(lane.ran) <= len(SIZES) + 1, "the first lane alone runs the first once more"


def test_what_was_measured_on_a_busy_machine_is_measured_anew() -> None:
    """A batch of 32 takes as long as one row, which another start did not see."""
    lanes = [Timed(lambda rows: 0.002) for _ in range(2)]
    known = {size: 0.01 * size for size in SIZES}
    tuning = _run(lanes, SIZES, known=known).tuning
    assert tuning.best == 32
    assert tuning.seconds[32] < known[32] / 2


class Alone(Lane):
    """A lane that must be alone in its process for its first three runs of each size."""

    running = 0
    lock = threading.Lock()

    def __init__(self, seconds: float = 0.001) -> None:
        self.ran: list[int] = []
        self.seconds = seconds

    def run(self, batch: Batch) -> Mapping[str, Array]:
        first = self.ran.count(batch.bucket) < 3
        self.ran.append(batch.bucket)
        with Alone.lock:
            Alone.running += 1
            assert not first or Alone.running == 1, "another lane runs meanwhile"
        time.sleep(self.seconds)
        with Alone.lock:
            Alone.running -= 1
        return {"y": np.zeros((batch.rows, 3), np.float32)}


@pytest.mark.parametrize("known", [{}, dict.fromkeys(SIZES, 0.001)], ids=["new", "known"])
def test_lanes_run_each_size_alone_until_they_are_warm_and_then_together(
    known: Mapping[int, float],
) -> None:
    """A first run, or a capture, on one lane may break what another one captures."""
    lanes = [Alone() for _ in range(3)]
    threads = LaneThreads("m")
    runs_ = Runs(
        "m", lanes, threads, _make, SIZES, forecast=Forecast(left=list), known=known, times=3
    )
    runs_.run()
    runs_.also(lambda size: _make(100 + size), [1, 2])
    threads.end()
    assert all(lane.ran.count(size) > 3 for lane in lanes for size in [*SIZES, 101, 102])


def test_a_size_that_takes_long_is_not_run_more_often_than_its_first_run_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first run may load and compile; the second one tells."""
    monkeypatch.setattr(runs, "SLOW_S", 0.02)
    lane = Alone(0.05)
    _run([lane], [1], times=3)
    assert lane.ran == [1, 1, 1], "on one lane that is all lanes: twice alone, once to measure"


class Card:
    """Runs `at_once` batches at the same time, each in 4 ms, on as many lanes as are opened."""

    def __init__(self, at_once: int) -> None:
        self.places = threading.Semaphore(at_once)
        self.lanes: list[OnCard] = []

    def open(self) -> OnCard:
        self.lanes.append(OnCard(self))
        return self.lanes[-1]


class OnCard(Lane):
    def __init__(self, card: Card) -> None:
        self._card = card
        self.ran: list[int] = []
        self.closed = False

    def run(self, batch: Batch) -> Mapping[str, Array]:
        assert not self.closed
        self.ran.append(batch.rows)
        with self._card.places:
            time.sleep(0.004)
        return {"y": np.zeros((batch.rows, 3), np.float32)}

    def close(self) -> None:
        self.closed = True


def _on_card(card: Card, **given: Any) -> Warmed:
    lanes = [card.open() for _ in range(2)]
    return _run(lanes, [1, 2, 4], times=3, further=[card.open] * 2, **given)


@pytest.mark.parametrize(("at_once", "lanes", "opened"), [(1, 2, 3), (3, 3, 4), (9, 4, 4)])
def test_a_lane_more_is_opened_as_long_as_it_makes_the_model_faster(
    at_once: int, lanes: int, opened: int
) -> None:
    """What gains nothing is closed again; what serves has run every size."""
    card = Card(at_once)
    warmed = _on_card(card)
    assert list(warmed.lanes) == card.lanes[:lanes]
    assert warmed.tuning.lanes == lanes
    assert [lane.closed for lane in card.lanes] == [n >= lanes for n in range(opened)]
    assert all(lane.ran.count(size) >= 3 for lane in card.lanes[:lanes] for size in (1, 2, 4))
    rate = warmed.tuning.rows_per_s(4) / (min(lanes, at_once) * 4 / 0.004)
    assert 0.5 < rate < 1.2, "what all of them serve is known"


def test_as_many_lanes_are_opened_as_an_earlier_start_found_to_be_best() -> None:
    known = dict.fromkeys([1, 2, 4], 0.004)
    for lanes in (2, 3):
        card = Card(9)
        warmed = _on_card(card, known=known, lanes_known=lanes)
        assert len(warmed.lanes) == len(card.lanes) == lanes
        assert warmed.tuning.seconds == known


def test_a_lane_more_that_does_not_fit_is_none() -> None:
    card = Card(9)

    def short() -> OnCard:
        raise MemoryError("cuMemAlloc failed: out of memory")

    warmed = _run([card.open(), card.open()], [1, 2], times=3, further=[short, card.open])
    assert list(warmed.lanes) == card.lanes
    assert len(card.lanes) == 2


@pytest.mark.parametrize(
    ("seconds", "most"), [(0.1, 6), (0.25, 6), (1.0, 4)], ids=["1 s", "2.5 s", "10 s"]
)
def test_a_model_whose_batches_take_long_whatever_their_size_gets_full_batches(
    monkeypatch: pytest.MonkeyPatch, seconds: float, most: int
) -> None:
    """A tenth of the time: 1, 2.5 and 10 s in place of 0.1, 0.25 and 1 s."""
    monkeypatch.setattr(runs, "BUDGET_S", runs.BUDGET_S / 10)
    monkeypatch.setattr(runs, "SLOW_S", runs.SLOW_S / 10)
    lane = Timed(lambda rows: seconds)
    warmed = _run([lane], SIZES)
    assert warmed.tuning.best == 32
    assert warmed.rows == 32
    assert len(lane.ran) <= most, "a start that takes minutes helps nobody"
    assert len(set(lane.ran)) == len(lane.ran), "a size that was run once was measured"


def test_a_model_that_takes_long_by_the_row_is_not_run_at_sizes_that_would_take_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "BUDGET_S", 0.5)
    monkeypatch.setattr(runs, "SLOW_S", 0.01)
    lane = Timed(lambda rows: 0.2 * rows)
    warmed = _run([lane], SIZES)
    assert set(lane.ran) == {1, 2}
    assert warmed.tuning.best in lane.ran
    assert warmed.rows == 32, "not having been run is no reason to refuse it"


def test_lanes_are_measured_side_by_side() -> None:
    lanes = [Timed(lambda rows: 0.2) for _ in range(3)]
    warmed = _run(lanes, [4])
    assert 0.2 <= warmed.tuning.batch_s(4) < 0.4, "one after the other they take 0.6 s"
    assert len({thread for lane in lanes for thread in lane.threads}) >= 3


def test_what_the_engine_raises_is_raised() -> None:
    def fail(rows: int) -> float:
        if rows == 2:
            raise ValueError("no luck with two")
        return 0.0

    with pytest.raises(ValueError, match="no luck with two"):
        _run([Timed(fail)], [1, 2])


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_a_size_for_which_memory_is_refused_is_not_served_and_the_model_is(
    problem: Exception,
) -> None:
    def fail(rows: int) -> float:
        if rows > 4:
            raise problem
        return 0.001

    warmed = _run([Timed(fail), Timed(fail)], [1, 2, 4, 8])
    assert warmed.rows < 8
    assert warmed.tuning.sizes[-1] == warmed.rows
    assert "no memory for" in warmed.why


def test_the_bucket_of_the_largest_batch_runs_and_is_never_aimed_at() -> None:
    lane = Timed(lambda bucket: 0.02)
    tuning = _run([lane], [4, 9], make=lambda size: _make(size, (4, 16, 32))).tuning
    assert set(lane.ran) == {4, 16}, "32 is never run"
    assert tuning.best == 9
    assert set(tuning.seconds) == {4, 9}


@pytest.mark.parametrize(
    ("limit_mb", "lanes", "rows"), [(700, 2, 2), (700, 1, 4), (2000, 2, 8), (10_000, 2, 32)]
)
def test_sizes_end_before_the_memory_does(limit_mb: int, lanes: int, rows: int) -> None:
    memory = Memory(limit_mb * MB, 64 * MB)
    warmed = _run([Growing(memory) for _ in range(lanes)], SIZES, forecast=memory.forecast())
    assert not memory.killed
    assert warmed.rows == rows
    assert warmed.elements == rows * 3
    assert len(warmed.lanes) == lanes
    assert ("MB of the cgroup /x are left" in warmed.why) == (rows < 32)


def test_as_many_lanes_serve_as_have_memory_for_one_row() -> None:
    memory = Memory(700 * MB, 150 * MB)
    lanes = [Growing(memory) for _ in range(8)]
    warmed = _run(lanes, SIZES, forecast=memory.forecast())
    assert not memory.killed
    assert (len(warmed.lanes), warmed.rows) == (2, 1)
    assert "3 lanes of 1 rows would take" in warmed.why_lanes
    assert not any(lane.ran for lane in lanes[2:])


def test_where_nothing_tells_of_memory_everything_is_tried() -> None:
    def unknown() -> Usage:
        raise OSError

    assert _run([Timed(lambda rows: 0.0)], SIZES, forecast=Forecast(unknown)).rows == 32


def test_a_size_that_ended_a_process_and_those_above_it_are_not_tried() -> None:
    lane = Timed(lambda rows: 0.001)
    warmed = _run([lane], SIZES, refused=(8 * 3, "8 ended it"))
    assert set(lane.ran) == {1, 2, 4}
    assert (warmed.rows, warmed.why) == (4, "8 ended it")


def test_a_size_is_noted_while_it_runs_for_the_first_time(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    notes = Notes(cache, "m.1.key", 0)
    notes.open()
    (note,) = tmp_path.glob("*.trying")
    told: dict[int, bytes] = {}

    def seconds(rows: int) -> float:
        told.setdefault(rows, note.read_bytes())
        return 0.001

    _run([Timed(seconds)], [1, 2, 4], notes=notes)
    assert b'"trying":null' in told[1], "nothing is smaller"
    assert b'"trying":{"elements":12,"rows":4}' in told[4]
    assert b'"trying":null' in told[2], "it is smaller than one that was survived"
    assert b'"trying":null' in note.read_bytes()


def test_a_lane_more_that_fails_is_closed_and_the_others_serve() -> None:
    """Nobody has asked for it: it is no reason not to serve the model."""
    card = Card(9)

    def fails() -> OnCard:
        lane = card.open()

        def run(_: Batch) -> Mapping[str, Array]:
            raise EngineError("out of memory, not known as such")

        lane.run = run  # type: ignore[method-assign, assignment]
        return lane

    warmed = _run([card.open(), card.open()], [1, 2], times=3, further=[fails, card.open])
    assert list(warmed.lanes) == card.lanes[:2]
    assert [lane.closed for lane in card.lanes] == [False, False, True]
    assert warmed.tuning.lanes == 2
