"""Audits cost little, are in nobody's way, and end batches of a model that mixes rows."""

from __future__ import annotations

import gc
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import numpy as np
import pytest
from helpers.wait import until

from inferq.shared.errors import FatalEngineError, RequestError
from inferq.shared.schema import Array, Ticket
from inferq.workers.audit.audit import Audit
from inferq.workers.audit.budget import FREE, LATE, SHARE, SHORT_S, AuditBudget
from inferq.workers.audit.evidence import Result
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Finished, Job
from inferq.workers.data_plane.lanes import Lanes
from inferq.workers.models.engine import Batch, Lane, gather, without_padding
from inferq.workers.models.lane_threads import LaneThreads

KNOBS = Knobs(max_batch_size=16, spread=True)


# --- the budget ----------------------------------------------------------------------------------


def batches_audited(budget: AuditBudget, batches: int, took_s: float, audit_s: float) -> list[int]:
    """Which of so many batches are audited, if their lane idles after each."""
    audited = []
    for n in range(batches):
        if allowed(budget, took_s, (n + 1) * took_s, idle=True):
            audited.append(n)
            budget.spent(audit_s)
    return audited


def allowed(budget: AuditBudget, took_s: float, computed_s: float, *, idle: bool) -> bool:
    """Whether an audit may be once one more batch has ended."""
    budget.left -= 1
    return budget.left <= 0 and budget.allows(took_s, computed_s, idle)


def test_the_first_batches_are_audited_and_then_one_in_so_many() -> None:
    audited = batches_audited(AuditBudget(20), 100, 1.0, 1e-6)
    assert audited == [0, 2, 6, 14, 30, 50, 70, 90]
    assert batches_audited(AuditBudget(1), 5, 1.0, 1e-6) == [0, 1, 2, 3, 4]
    assert batches_audited(AuditBudget(0), 5, 1.0, 1e-6) == []


@pytest.mark.parametrize("audit_s", [0.001, 0.01, 0.1])
def test_all_but_the_first_audits_take_no_more_than_their_share(audit_s: float) -> None:
    audited = batches_audited(AuditBudget(4), 20_000, 0.01, audit_s)
    spent, computed = (len(audited) - FREE) * audit_s, 20_000 * 0.01
    assert SHARE * computed - 2 * audit_s <= spent <= SHARE * computed


def test_a_lane_that_never_idles_is_audited_late() -> None:
    budget = AuditBudget(100)
    took = [allowed(budget, SHORT_S / 2, 1.0, idle=False) for _ in range(LATE)]
    assert took == [False] * (LATE - 1) + [True]
    budget.spent(1e-6)
    took = [allowed(budget, SHORT_S / 2, 1.0, idle=False) for _ in range(2 * LATE)]
    assert took == [False] * (2 * LATE - 1) + [True]


def test_nobody_waits_for_the_first_audits_of_slow_batches() -> None:
    budget = AuditBudget(100)
    assert not any(allowed(budget, SHORT_S, 1.0, idle=False) for _ in range(100))
    assert allowed(budget, SHORT_S, 1.0, idle=True)


# --- on lanes ------------------------------------------------------------------------------------


class Computing(Lane):
    """Answers y = `model`(x); `watch` sees each batch before it is run."""

    def __init__(self, model: Callable[[Array], Array]) -> None:
        self.model = model
        self.batches: list[Batch] = []
        self.watch: Callable[[Batch], None] = lambda _: None

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.batches.append(batch)
        self.watch(batch)
        return without_padding(batch, {"y": self.model(gather(batch)["x"])})

    def rows(self) -> list[int]:
        """Of all runs so far."""
        return [batch.rows for batch in self.batches]


def with_mean(x: Array) -> Array:
    mixed: Array = x + 0.05 * x.mean(axis=0, keepdims=True)
    return mixed


def above_two(x: Array) -> Array:
    chosen: Array = x[x[:, 0] > 2]
    return chosen


def job(*values: float, alone: bool = False) -> Job:
    items = [
        Waiting(
            ticket=Ticket(f"{value:g}", "m", ""),
            inputs={"x": np.full((1, 2), value)},
            slot=None,
            compatible=None,
            arrived_mono_ms=0.0,
            claimed_redis_ms=0.0,
            rows=1,
            alone=alone,
        )
        for value in values
    ]
    return Job(items, {0: len(items)})


class Driven:
    """Lanes with an audit of each of their batches, as far as its budget goes."""

    def __init__(self, lanes: list[Computing], unbatch: bool, knobs: Knobs) -> None:
        self.woken: SimpleQueue[None] = SimpleQueue()
        self.done: SimpleQueue[Finished] = SimpleQueue()
        self.audit = Audit(
            "m",
            1,
            knobs,
            unbatch=unbatch,
            answered=lambda: 7,
            wake=lambda: self.woken.put(None),
        )
        never_late = lambda _slot, _ticket: None  # noqa: E731
        self.lanes = Lanes(
            "m", lanes, LaneThreads("m"), knobs, never_late, self.done.put, audit=self.audit
        )
        self.lanes.start()

    def compute(self, *values: float) -> Finished:
        self.lanes.put(job(*values))
        return self.done.get(timeout=10)

    def audits(self) -> int:
        return sum(self.audit.results.values())

    def audited(self, count: int) -> None:
        """Wait until so many audits have ended."""
        until(lambda: self.audits() == count and self.audit.since is None, 10)


@contextmanager
def driven(*lanes: Computing, unbatch: bool = True, knobs: Knobs = KNOBS) -> Iterator[Driven]:
    started = Driven(list(lanes), unbatch, knobs)
    yield started
    assert started.lanes.stop(10)


def answers(finished: Finished) -> dict[str, list[list[float]]]:
    return {
        outcome.item.ticket.id: outcome.outputs["y"].tolist() if outcome.outputs else []
        for outcome in finished.outcomes
    }


def test_results_do_not_wait_for_the_audit_of_their_batch() -> None:
    entered, may_go = SimpleQueue[None](), SimpleQueue[None]()

    def hold_audits(batch: Batch) -> None:
        if batch.rows == 1:
            entered.put(None)
            may_go.get(timeout=10)

    lane = Computing(lambda x: 2 * x)
    lane.watch = hold_audits
    with driven(lane) as of:
        assert of.compute(1, 2)
        entered.get(timeout=10)
        assert of.audit.since is not None
        assert of.lanes.computing() == [], "its requests are answered"
        may_go.put(None)
        of.audited(1)
        assert of.audit.results[Result.SAME] == 1
        assert of.audit.took_s > 0


def test_a_batch_that_had_no_company_is_not_audited() -> None:
    lane = Computing(lambda x: 2 * x)
    with driven(lane) as of:
        for value in range(5):
            of.compute(value)
        of.compute(5, 6)
        of.audited(1)
        assert lane.rows() == [1, 1, 1, 1, 1, 2, 1]


def test_an_audit_takes_the_last_request_the_first_and_others_in_turn() -> None:
    lane = Computing(lambda x: 2 * x)
    with driven(lane) as of:
        for n in range(FREE):
            of.compute(*range(10))
            of.audited(n + 1)
    alone = [batch.parts[0]["x"][0, 0] for batch in lane.batches if batch.rows == 1]
    assert alone[:2] == [9, 0]
    assert 0 < alone[2] < 9


def test_no_audit_begins_while_a_request_waits_for_the_lane() -> None:
    lane = Computing(lambda x: 2 * x)
    with driven(lane) as of:
        of.audit.hold()  # until all are there
        of.compute(0, 1)
        entered, may_go = SimpleQueue[None](), SimpleQueue[None]()

        def hold_the_first(batch: Batch) -> None:
            if len(lane.batches) == 2:
                entered.put(None)
                may_go.get(timeout=10)

        lane.watch = hold_the_first
        for value in range(3):
            of.lanes.put(job(value, value + 1))
        entered.get(timeout=10)
        of.audit.release()
        may_go.put(None)
        for _ in range(3):
            of.done.get(timeout=10)
        of.audited(1)
        assert lane.rows() == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("how", ["held", "stopped"])
def test_no_audit_begins_beside_a_suspect_or_at_the_end(how: str) -> None:
    lane = Computing(lambda x: 2 * x)
    with driven(lane) as of:
        if how == "held":
            assert not of.audit.hold()
        else:
            of.audit.stop()
        for value in range(5):
            of.compute(value, value + 1)
        assert of.compute(7, 8)
        assert lane.rows() == [2] * 6
        if how == "held":
            of.audit.release()
            of.compute(1, 2)
            of.audited(1)


def test_who_holds_audits_back_is_told_that_one_runs_and_when_it_ends() -> None:
    entered, may_go = SimpleQueue[None](), SimpleQueue[None]()

    def hold_audits(batch: Batch) -> None:
        if batch.rows == 1:
            entered.put(None)
            may_go.get(timeout=10)

    lane = Computing(lambda x: 2 * x)
    lane.watch = hold_audits
    with driven(lane) as of:
        of.compute(1, 2)
        entered.get(timeout=10)
        assert of.audit.hold()
        with pytest.raises(Empty):
            of.woken.get_nowait()
        may_go.put(None)
        of.woken.get(timeout=10)
        assert not of.audit.hold()


def test_a_suspect_is_never_run_again() -> None:
    lane = Computing(lambda x: 2 * x)
    with driven(lane, knobs=Knobs(max_batch_size=4, buckets=(4,), spread=True)) as of:
        of.lanes.put(job(1, alone=True))
        of.done.get(timeout=10)
        of.compute(1, 2)
        of.audited(1)
        assert lane.rows() == [1, 2, 1]


def test_what_an_audit_held_is_gone_when_it_has_ended() -> None:
    lane = Computing(lambda x: 2 * x)
    with driven(lane) as of:
        finished = of.compute(1, 2)
        of.audited(1)
        lane.batches.clear()
        outputs = finished.outcomes[0].outputs
        assert outputs is not None
        kept = [weakref.ref(finished.job.items[1].inputs["x"]), weakref.ref(outputs["y"])]
        del finished, outputs

        def gone() -> bool:
            gc.collect()
            return not any(each() is not None for each in kept)

        until(gone, 10, "inputs and outputs are dropped")


def test_after_a_mismatch_all_run_by_themselves_also_what_was_formed_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lane = Computing(with_mean)
    with driven(lane) as of, caplog.at_level(logging.WARNING):
        of.compute(1, 3)
        of.audited(1)
        assert of.audit.unbatched
        finished = of.compute(*range(10))
        for n, outcome in enumerate(finished.outcomes):
            assert outcome.outputs is not None
            np.testing.assert_allclose(outcome.outputs["y"], [[1.05 * n] * 2])
        runs = [outcome.run for outcome in finished.outcomes]
        assert [(run.rows, run.requests, run.padding) for run in runs if run] == [(1, 1, 0)] * 10
        for _ in range(5):
            of.compute(1, 3)
        assert of.audits() == 1, "there is nothing to audit any more"
    (told,) = caplog.records
    text = told.getMessage()
    assert "model m: answers depend on who shares their batch: of a batch of 2 rows" in text
    assert "output 'y' differs by" in text
    assert "batchable = false" in text
    assert of.audit.mismatch is not None
    assert (of.audit.mismatch.rows, of.audit.mismatch.requests) == (2, 7)
    assert of.audit.summary().endswith("in one of 2 rows; runs request by request")


def test_with_warn_it_only_tells_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    lane = Computing(with_mean)
    with driven(lane, unbatch=False) as of, caplog.at_level(logging.WARNING):
        for n in range(FREE):
            of.compute(1, 3)
            of.audited(n + 1)
        assert of.audit.results[Result.DIFFERENT] == FREE
        assert not of.audit.unbatched
        run = of.compute(1, 3).outcomes[0].run
        assert run is not None
        assert run.requests == 2
    (told,) = caplog.records
    assert "goes on in batches" in told.getMessage()


def test_a_change_that_only_the_number_of_rows_makes_is_proof_the_third_time() -> None:
    lane = Computing(lambda x: x * len(x))
    with driven(lane) as of:
        for n in range(FREE):
            assert not of.audit.unbatched
            of.compute(1, 2)
            of.audited(n + 1)
        assert of.audit.results[Result.UNCLEAR] == FREE
        assert of.audit.unbatched


def test_a_model_that_is_random_is_told_of_once_and_audited_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(0)
    lane = Computing(lambda x: rng.normal(size=x.shape))
    with driven(lane) as of, caplog.at_level(logging.WARNING):
        for _ in range(10):
            of.compute(1, 2)
        of.audited(1)
        assert of.audit.results[Result.RANDOM] == 1
        assert not of.audit.unbatched
    (told,) = caplog.records
    assert "answers the same run in two ways" in told.getMessage()


def test_an_engine_that_fails_in_audits_fails_no_request_and_ends_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def model(x: Array) -> Array:
        if len(x) == 1:
            raise ValueError("never alone")
        return 2 * x

    with driven(Computing(model)) as of, caplog.at_level(logging.WARNING):
        for n in range(10):
            finished = of.compute(1, 2)
            assert answers(finished) == {"1": [[2, 2]], "2": [[4, 4]]}
            of.audited(min(n + 1, 3))
    assert of.audit.results[Result.FAILED] == 3
    (told,) = caplog.records
    assert "never alone" in told.getMessage()


def test_a_request_that_alone_is_answered_by_an_error_of_its_own_is_no_mismatch() -> None:
    class Refusing(Computing):
        def run(self, batch: Batch) -> Mapping[str, Array]:
            outputs = super().run(batch)
            if batch.rows == 1:
                batch.errors = {0: RequestError("not alone")}
                return {"y": np.zeros((1, 2))}
            return outputs

    with driven(Refusing(lambda x: 2 * x)) as of:
        assert answers(of.compute(1, 2)) == {"1": [[2, 2]], "2": [[4, 4]]}
        of.audited(1)
    assert of.audit.results[Result.FAILED] == 1
    assert of.audit.mismatch is None


def test_an_engine_beyond_use_in_an_audit_is_beyond_use() -> None:
    def model(x: Array) -> Array:
        if len(x) == 1:
            raise FatalEngineError("sticky")
        return 2 * x

    with driven(Computing(model)) as of:
        finished = of.compute(1, 2)
        assert (len(finished.outcomes), finished.fatal, finished.audited) == (2, None, False)
        ended = of.done.get(timeout=10)
        assert (str(ended.fatal), ended.outcomes, ended.audited) == ("sticky", (), True)
        assert ended.job is finished.job
        until(lambda: not of.lanes.is_alive, 10, "its lane has ended")


def test_one_audit_runs_at_a_time() -> None:
    entered, may_go = SimpleQueue[None](), SimpleQueue[None]()

    def hold_audits(batch: Batch) -> None:
        if batch.rows == 1:
            entered.put(None)
            may_go.get(timeout=10)

    lanes = [Computing(lambda x: 2 * x) for _ in range(2)]
    for lane in lanes:
        lane.watch = hold_audits
    with driven(*lanes) as of:
        of.compute(1, 2)
        entered.get(timeout=10)
        for _ in range(5):  # by the other lane
            of.compute(1, 2)
        assert entered.empty()
        may_go.put(None)
        of.audited(1)
        for _ in range(100):
            may_go.put(None)


# --- rows that are not the requests' -------------------------------------------------------------


def test_a_batch_of_other_rows_whose_requests_alone_are_right_is_proof() -> None:
    lane = Computing(lambda x: x.sum(axis=0, keepdims=True))
    with driven(lane) as of:
        assert answers(of.compute(1, 2, 3)) == {"1": [[1, 1]], "2": [[2, 2]], "3": [[3, 3]]}
        assert of.audit.unbatched
        assert of.audit.mismatch is not None
        assert of.audit.mismatch.what == "output 'y' has 1 rows; expected 3, as the inputs"
        assert of.audit.mismatch.rows == 3


def test_one_request_of_other_rows_is_at_fault_itself() -> None:
    lane = Computing(above_two)
    with driven(lane) as of:
        finished = of.compute(1, 3, 4, 5)
        assert [str(outcome.error) for outcome in finished.outcomes if outcome.error] == [
            "output 'y' has 0 rows; expected 1, as the inputs"
        ]
        assert answers(finished) == {"1": [], "3": [[3, 3]], "4": [[4, 4]], "5": [[5, 5]]}
        assert not of.audit.unbatched


def test_several_requests_of_other_rows_are_answered_as_alone_from_then_on() -> None:
    lane = Computing(above_two)
    with driven(lane) as of:
        of.compute(0, 1, 2, 5)
        assert of.audit.unbatched
        finished = of.compute(1, 3)
        assert [outcome.error for outcome in finished.outcomes] == [None, None]
        assert answers(finished) == {"1": [], "3": [[3, 3]]}
        outputs = finished.outcomes[0].outputs
        assert outputs is not None
        assert outputs["y"].shape == (0, 2)


def test_rows_that_only_padding_changes_are_those_of_the_request_alone() -> None:
    lane = Computing(lambda x: x if len(x) == 1 else x[:1])
    knobs = Knobs(max_batch_size=4, buckets=(4,), spread=True)
    with driven(lane, knobs=knobs) as of:
        assert answers(of.compute(3)) == {"3": [[3, 3]]}
        assert of.audit.unbatched
        assert [(batch.rows, batch.bucket) for batch in lane.batches] == [(1, 4), (1, 1)]


def test_a_request_that_runs_by_itself_may_take_as_long_as_a_batch() -> None:
    """max_run_seconds is that of each run, not of all that were formed into one batch."""
    lane = Computing(with_mean)
    with driven(lane) as of:
        of.compute(1, 2)
        of.audited(1)
        began: list[float] = []

        def look(batch: Batch) -> None:
            time.sleep(0.002)
            began.extend(begun for _, begun in of.lanes.computing())

        lane.watch = look
        of.compute(*range(5))
        assert len(began) == 5
        assert all(later > earlier for earlier, later in itertools.pairwise(began))
