"""A lane runs batches; what fails is run again in halves until the culprit is by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import pytest

from inferq.shared.errors import (
    DeadlineExceeded,
    EngineError,
    FatalEngineError,
    InvalidInput,
    RequestError,
)
from inferq.shared.schema import Array, Ticket
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Finished, Job, Outcome
from inferq.workers.claims.verdicts import Failed, Revoked
from inferq.workers.data_plane.lanes import Lanes, execute
from inferq.workers.models.engine import Batch, Lane, gather
from inferq.workers.models.lane_threads import LaneThreads
from inferq.workers.warmup.fit import Fit

KNOBS = Knobs(max_batch_size=16)


class Echo(Lane):
    """Gives back its inputs; `judge` may raise, seeing them joined. Counts its runs."""

    def __init__(self, judge: Callable[[Array], None] = lambda x: None) -> None:
        self.judge = judge
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.batches.append(batch)
        x = gather(batch)["x"]
        self.judge(x)
        return {"x": x[: batch.rows] if batch.batchable else x}


def items(*values: float, rows: int = 1) -> list[Waiting]:
    return [
        Waiting(
            ticket=Ticket(f"{value:g}", "m", ""),
            inputs={"x": np.full((rows, 2), value)},
            slot=None,
            compatible=None,
            arrived_mono_ms=0.0,
            claimed_redis_ms=0.0,
            rows=rows,
            alone=False,
        )
        for value in values
    ]


def run(lane: Echo, waiting: Sequence[Waiting], knobs: Knobs = KNOBS) -> dict[str, Outcome]:
    outcomes = execute(lane, waiting, knobs)
    assert [outcome.item for outcome in outcomes] == list(waiting), "one each, in order"
    return {outcome.item.ticket.id: outcome for outcome in outcomes}


def assert_echoed(outcome: Outcome) -> None:
    assert outcome.error is None
    assert outcome.outputs is not None
    np.testing.assert_array_equal(outcome.outputs["x"], outcome.item.inputs["x"])


def refuse(*values: float) -> Callable[[Array], None]:
    def judge(x: Array) -> None:
        if np.isin(x, values).any():
            raise ValueError("bad row")

    return judge


def test_each_request_gets_its_own_rows() -> None:
    waiting = [*items(1, 2), *items(3, rows=3), *items(4)]
    lane = Echo()
    for outcome in run(lane, waiting).values():
        assert_echoed(outcome)
        assert outcome.run is not None
        assert (outcome.run.rows, outcome.run.requests, outcome.run.padding) == (6, 4, 0)
    assert len(lane.batches) == 1


class Refusing(Echo):
    """Answers rows that hold one of `values` by an error of their own."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def run(self, batch: Batch) -> Mapping[str, Array]:
        outputs = super().run(batch)
        refused = np.isin(gather(batch)["x"], self.values).any(axis=1)
        errors = {int(row): RequestError(f"row {row}") for row in np.flatnonzero(refused)}
        batch.errors = errors or None
        return {} if len(errors) == batch.rows else outputs


def test_a_request_with_an_error_in_one_of_its_rows_fails_alone_and_nothing_runs_again() -> None:
    lane = Refusing(2, 3)
    waiting = [*items(1), *items(2, rows=3), *items(3), *items(4, rows=2)]
    outcomes = run(lane, waiting)
    assert len(lane.batches) == 1
    for name in ("1", "4"):
        assert_echoed(outcomes[name])
    for name, row in (("2", 1), ("3", 4)):
        error = outcomes[name].error
        assert type(error) is RequestError
        assert error.message == f"row {row}"
        assert outcomes[name].outputs is None
    assert type(run(Refusing(5), items(5))["5"].error) is RequestError
    alone = run(Refusing(2), items(1, 2, 3), Knobs(max_batch_size=1, batchable=False))
    assert [alone[name].error is None for name in ("1", "2", "3")] == [True, False, True]


def test_a_request_that_is_run_in_pieces_has_the_error_of_one_of_them() -> None:
    fit = Fit("m", elements=4, row=2)
    waiting = items(1, rows=6)
    waiting[0].inputs["x"][3] = 9
    (outcome,) = execute(Refusing(9), waiting, KNOBS, None, fit)
    assert isinstance(outcome.error, RequestError)
    assert outcome.outputs is None


def test_a_batch_runs_at_its_bucket_and_parts_of_it_at_theirs() -> None:
    lane = Echo(refuse(1))
    outcomes = run(lane, items(*range(5)), Knobs(max_batch_size=8, buckets=(1, 4, 8)))
    assert [(batch.rows, batch.bucket) for batch in lane.batches] == [
        (5, 8),
        (2, 4),
        (1, 1),
        (1, 1),
        (3, 4),
    ]
    last = outcomes["4"].run
    assert last is not None
    assert (last.rows, last.padding, last.requests) == (3, 1, 3)


@pytest.mark.parametrize("culprits", [(0,), (7,), (3, 4), (0, 5, 15), tuple(range(16))])
def test_only_the_culprits_fail(culprits: tuple[int, ...]) -> None:
    lane = Echo(refuse(*culprits))
    for name, outcome in run(lane, items(*range(16))).items():
        if int(name) in culprits:
            assert type(outcome.error) is EngineError
            assert "ValueError: bad row" in str(outcome.error)
            assert outcome.run is None
        else:
            assert_echoed(outcome)
    assert len(lane.batches) < 32


def test_an_error_of_ours_reaches_the_caller_as_it_is() -> None:
    def judge(x: Array) -> None:
        raise InvalidInput("input 'x': no such word")

    (outcome,) = run(Echo(judge), items(1)).values()
    assert type(outcome.error) is InvalidInput


@pytest.mark.parametrize("problem", [MemoryError(), RecursionError(), SystemError("odd")])
def test_whatever_an_engine_raises_fails_its_request_only(problem: Exception) -> None:
    def judge(x: Array) -> None:
        if (x == 1).any():
            raise problem

    outcomes = run(Echo(judge), items(0, 1, 2))
    assert type(outcomes["1"].error) is EngineError
    assert_echoed(outcomes["0"])
    assert_echoed(outcomes["2"])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_outputs_with_other_rows_than_the_inputs_are_never_handed_out(rows: int) -> None:
    class Wrong(Echo):
        def run(self, batch: Batch) -> Mapping[str, Array]:
            if batch.rows > 1 or any((part["x"] == 1).all() for part in batch.parts):
                return {"x": np.zeros((rows if rows != batch.rows else 9, 2))}
            return super().run(batch)

    outcomes = run(Wrong(), items(0, 1))
    assert_echoed(outcomes["0"])
    assert "expected 1, as the inputs" in str(outcomes["1"].error)


def test_a_scalar_output_of_a_batch_is_an_engine_error() -> None:
    class Scalar(Echo):
        def run(self, batch: Batch) -> Mapping[str, Array]:
            return {"x": np.zeros((), np.float32)}

    (outcome,) = run(Scalar(), items(1)).values()
    assert "has no rows" in str(outcome.error)


def test_a_model_that_is_not_batchable_answers_with_any_shape() -> None:
    lane = Echo()
    knobs = Knobs(max_batch_size=1, batchable=False, buckets=(1,))
    for outcome in run(lane, items(1, rows=5), knobs).values():
        assert_echoed(outcome)
        assert outcome.run is not None
        assert outcome.run.padding == 0
    assert not lane.batches[0].batchable


# --- the threads ---------------------------------------------------------------------------------


def job(*values: float) -> Job:
    waiting = items(*values)
    return Job(waiting, {0: len(waiting)})


def never_late(slot: object, ticket: Ticket) -> None:
    return None


def started(
    *lanes: Echo, too_late: Callable[[Any, Ticket], Failed | Revoked | None] = never_late
) -> tuple[Lanes, SimpleQueue[Finished]]:
    done: SimpleQueue[Finished] = SimpleQueue()
    driven = Lanes("lane", lanes, LaneThreads("lane"), KNOBS, too_late, done.put)
    driven.start()
    return driven, done


class Gate:
    """Holds a batch until it is opened."""

    def __init__(self) -> None:
        self._entered: SimpleQueue[None] = SimpleQueue()
        self._open: SimpleQueue[None] = SimpleQueue()

    def __call__(self, x: Array) -> None:
        self._entered.put(None)
        self._open.get(timeout=10)

    def entered(self) -> None:
        self._entered.get(timeout=10)

    def open(self) -> None:
        self._open.put(None)


def test_a_lane_hands_back_each_batch_and_is_ready_for_the_next() -> None:
    lanes, done = started(Echo(refuse(2)))
    for values in ((1,), (2,), (1, 2, 3)):
        given = job(*values)
        lanes.put(given)
        finished = done.get(timeout=10)
        assert (finished.job, finished.fatal) == (given, None)
        assert finished.ended >= finished.began > 0
        failed = [outcome.item.ticket.id for outcome in finished.outcomes if outcome.error]
        assert failed == ["2"] * (2 in values)
    assert lanes.stop(10)


def test_what_waits_for_a_lane_can_be_taken_back_and_what_computes_cannot() -> None:
    gate = Gate()
    lanes, done = started(Echo(gate))
    running, waiting = job(1), [job(2), job(3)]
    lanes.put(running)
    gate.entered()
    assert [computed for computed, _ in lanes.computing()] == [running]
    for each in waiting:
        lanes.put(each)
    assert lanes.take_back() == waiting
    assert lanes.take_back() == []
    gate.open()
    assert done.get(timeout=10).job is running
    assert lanes.computing() == []
    assert lanes.stop(10)


def test_whichever_lane_is_free_takes_the_next_batch() -> None:
    held, free = Gate(), Echo()
    lanes, done = started(Echo(held), free)
    lanes.put(job(1))
    lanes.put(job(2))
    # One of them went to the lane that is held, unless the free one took both: then send more.
    ended = [done.get(timeout=10)]
    for value in range(3, 8):
        lanes.put(job(value))
        ended.append(done.get(timeout=10))
    assert len(free.batches) >= 5
    held.open()
    lanes.stop(10)


def test_a_batch_that_ends_while_ample_others_wait_is_in_no_hurry() -> None:
    gate = Gate()
    lanes, done = started(Echo(gate))
    lanes.enough_ahead = 2
    for value in range(4):
        lanes.put(job(value))
    lanes_run_short = []
    for _ in range(4):
        gate.open()
        lanes_run_short.append(done.get(timeout=10).lanes_run_short)
    assert lanes_run_short == [False, False, True, True]  # 3, 2, 1 and none waited
    assert lanes.stop(10)


def test_requests_that_are_too_late_when_their_batch_begins_are_not_computed() -> None:
    echo = Echo()

    def too_late(slot: object, ticket: Ticket) -> Failed | None:
        late = ticket.id in ("2", "4")
        return Failed(cast("Any", slot), ticket, DeadlineExceeded("late")) if late else None

    lanes, done = started(echo, too_late=too_late)
    lanes.put(job(1, 2, 3))
    finished = done.get(timeout=10)
    assert [outcome.item.ticket.id for outcome in finished.outcomes] == ["1", "3"]
    assert [late.ticket.id for late in finished.late] == ["2"]
    lanes.put(job(4))
    finished = done.get(timeout=10)
    assert (finished.outcomes, [late.ticket.id for late in finished.late]) == ((), ["4"])
    assert [batch.rows for batch in echo.batches] == [2]
    assert lanes.stop(10)


def test_an_engine_beyond_use_has_no_outcome_and_computes_no_more() -> None:
    def judge(x: Array) -> None:
        raise FatalEngineError("sticky")

    echo = Echo(judge)
    lanes, done = started(echo)
    lanes.put(job(1, 2))
    finished = done.get(timeout=10)
    assert str(finished.fatal) == "sticky"
    assert finished.outcomes == ()
    assert lanes.stop(10)
    lanes.put(job(3))
    assert len(lanes.take_back()) == 1
    assert len(echo.batches) == 1


def test_a_lane_that_is_busy_is_not_waited_for_too_long() -> None:
    gate = Gate()
    lanes, done = started(Echo(gate))
    lanes.put(job(1))
    gate.entered()
    assert not lanes.stop(0.01)
    gate.open()
    done.get(timeout=10)
    assert lanes.stop(10)


def test_a_lane_that_fails_beside_its_engine_says_so_and_leaves_no_batch_behind() -> None:
    def too_late(slot: object, ticket: Ticket) -> None:
        raise KeyError("nobody foresaw this")

    lanes, done = started(Echo(), too_late=too_late)
    given = job(1)
    lanes.put(given)
    finished = done.get(timeout=10)
    assert finished.job is given
    assert str(finished.fatal) == "its lane failed: KeyError: 'nobody foresaw this'"
    assert lanes.computing() == []
    assert lanes.stop(10)
