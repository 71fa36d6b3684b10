"""An answer that company changed is told from one that another number of rows rounds otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from inferq.shared.errors import EngineError, FatalEngineError
from inferq.shared.schema import Array, Ticket
from inferq.workers.audit import evidence as evidence_of
from inferq.workers.audit.evidence import Evidence, Result, examine, has_company
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Outcome
from inferq.workers.data_plane.lanes import execute
from inferq.workers.models.engine import Batch, Lane, gather, without_padding
from inferq.workers.row_probe.agreement import difference

Model = Callable[[Array], Array]


class Computing(Lane):
    """Answers y = `model`(x) as engines do; counts its runs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.batches.append(batch)
        return without_padding(batch, {"y": self.model(gather(batch)["x"])})


def requests(*rows: int, low: float = 1.0) -> list[Waiting]:
    """A request for each of `rows`, of so many rows of three different values."""
    rng = np.random.default_rng(0)
    return [
        Waiting(
            ticket=Ticket(f"{n}", "m", ""),
            inputs={"x": rng.uniform(low, 10, (count, 3))},
            slot=None,
            compatible=None,
            arrived_mono_ms=0.0,
            claimed_redis_ms=0.0,
            rows=count,
            alone=False,
        )
        for n, count in enumerate(rows)
    ]


def look(
    model: Model, rows: Sequence[int], place: int, *, exact: bool = True, **knobs: Any
) -> tuple[Evidence, Computing]:
    """What comes of an audit of the request at `place` in a batch of such requests."""
    lane, given = Computing(model), Knobs(max_batch_size=32, **knobs)
    outcomes = execute(lane, requests(*rows), given)
    lane.batches.clear()
    return found(lane, outcomes, place, exact=exact, knobs=given), lane


def found(
    lane: Lane, outcomes: Sequence[Outcome], place: int, *, exact: bool = True, knobs: Knobs
) -> Evidence:
    assert has_company(outcomes[place], exact)
    bucket = knobs.bucket(outcomes[place].item.rows)
    return examine(lane.run, outcomes, place, exact, bucket)


def twice(x: Array) -> Array:
    return 2 * x


def with_mean(x: Array) -> Array:
    """As company, in a share that a wide tolerance lets pass."""
    mixed: Array = x + 0.05 * x.mean(axis=0, keepdims=True)
    return mixed


def peaks(x: Array) -> Array:
    """The row and column of each row's largest value."""
    found: Array = np.stack(np.nonzero(x == x.max(axis=1, keepdims=True)), axis=1)
    return found


def to_the_longest(x: Array) -> Array:
    """As many columns as the batch's values have in common."""
    return np.zeros((len(x), int(x.sum())))


ROWS = (1, 3, 2, 1)


@pytest.mark.parametrize("place", range(len(ROWS)))
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("buckets", [(), (4, 8)])
def test_rows_that_are_independent_are_answered_as_alone(
    place: int, exact: bool, buckets: tuple[int, ...]
) -> None:
    evidence, lane = look(twice, ROWS, place, exact=exact, buckets=buckets)
    assert evidence == Evidence(Result.SAME)
    assert len(lane.batches) == 1, "one run of one request is all that it costs"


@pytest.mark.parametrize("place", range(len(ROWS)))
@pytest.mark.parametrize("model", [with_mean, to_the_longest], ids=["mean", "longest"])
@pytest.mark.parametrize("exact", [True, False])
def test_an_answer_that_neighbours_change_is_found_out(
    model: Model, place: int, exact: bool
) -> None:
    evidence, _ = look(model, ROWS, place, exact=exact, buckets=(8,))
    assert evidence.result is Result.DIFFERENT
    assert "output 'y' differs" in evidence.what


def test_an_answer_that_tells_its_place_in_the_batch_is_found_out() -> None:
    (first, _), (second, _) = (look(peaks, (1, 1, 1), place) for place in (0, 1))
    assert (first.result, second.result) == (Result.SAME, Result.DIFFERENT)


def test_an_answer_that_padding_changes_is_found_out_where_it_can_run_without() -> None:
    evidence, _ = look(with_mean, (3,), 0, buckets=(4,))
    assert evidence.result is Result.DIFFERENT
    (outcome,) = execute(Computing(twice), requests(3), Knobs(max_batch_size=4, buckets=(4,)))
    assert not has_company(outcome, exact=False), "it would be the very same run"
    (outcome,) = execute(Computing(twice), requests(4), Knobs(max_batch_size=4, buckets=(4,)))
    assert not has_company(outcome, exact=True)


def test_another_precision_at_another_number_of_rows_is_no_company() -> None:
    """As with TF32, or with kernels that are chosen by size."""
    evidence, _ = look(lambda x: x * (1 + 1e-3 * (len(x) > 1)), ROWS, 1)
    assert evidence.result is Result.SAME


def test_a_value_next_to_nothing_may_round_by_more_than_itself() -> None:
    lane = Computing(lambda x: x.sum(axis=1, keepdims=True) + 1e-6 * (len(x) > 1))
    items = requests(1, 1, 1)
    items[1].inputs["x"][:] = [[2.0, -1.0, -1.0 + 1e-9]]
    outcomes = execute(lane, items, Knobs(max_batch_size=4))
    lane.batches.clear()
    evidence = found(lane, outcomes, 1, knobs=Knobs(max_batch_size=4))
    assert evidence.result is Result.SAME
    assert len(lane.batches) == 1


def test_a_tie_that_falls_to_the_other_side_alone_is_no_proof() -> None:
    evidence, _ = look(lambda x: np.full((len(x), 1), len(x) > 1), ROWS, 0)
    assert evidence.result is Result.UNCLEAR


def test_a_model_that_counts_its_rows_is_not_taken_for_one_that_rounds() -> None:
    evidence, _ = look(lambda x: x * len(x), ROWS, 0)
    assert evidence.result is Result.UNCLEAR


@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_a_model_that_answers_the_same_run_in_two_ways_shows_nothing(noise: float) -> None:
    rng = np.random.default_rng(1)
    evidence, _ = look(lambda x: x + rng.normal(0, noise, x.shape), ROWS, 1)
    assert evidence.result is Result.RANDOM


def test_a_model_that_is_random_in_company_only_shows_nothing() -> None:
    rng = np.random.default_rng(1)
    evidence, _ = look(lambda x: x + (rng.normal() if len(x) > 3 else 0), ROWS, 1)
    assert evidence.result is Result.RANDOM


def test_a_run_alone_that_has_other_rows_than_the_request_is_found_out() -> None:
    def model(x: Array) -> Array:
        return x if len(x) > 3 else x[:1]

    for exact in (True, False):
        evidence, _ = look(model, ROWS, 1, exact=exact)
        assert evidence.result is Result.DIFFERENT


def test_a_model_that_takes_no_fewer_rows_than_its_first_bucket_is_run_at_that() -> None:
    def model(x: Array) -> Array:
        if len(x) < 4:
            raise EngineError("at least 4")
        return twice(x)

    evidence, lane = look(model, ROWS, 0, buckets=(4, 8))
    assert evidence.result is Result.SAME
    assert [batch.bucket for batch in lane.batches] == [1, 4]


def test_an_engine_that_fails_on_the_request_alone_fails_the_audit() -> None:
    def model(x: Array) -> Array:
        if len(x) == 1:
            raise ValueError("more, please")
        return x

    assert look(model, ROWS, 0)[0] == Evidence(Result.FAILED, "more, please")


def test_an_engine_beyond_use_is_no_evidence() -> None:
    def model(x: Array) -> Array:
        if len(x) == 1:
            raise FatalEngineError("sticky")
        return x

    with pytest.raises(FatalEngineError, match="sticky"):
        look(model, ROWS, 0)


def test_only_the_requests_of_its_own_run_are_its_company() -> None:
    """A batch that failed was run in parts."""

    def model(x: Array) -> Array:
        if len(x) > 2:
            raise ValueError("too many")
        return with_mean(x)

    lane = Computing(model)
    outcomes = execute(lane, requests(1, 1, 1, 1), Knobs(max_batch_size=4))
    lane.batches.clear()
    assert found(lane, outcomes, 3, knobs=Knobs(4)).result is Result.DIFFERENT
    assert [batch.rows for batch in lane.batches] == [1, 1, 2, 2]


def test_of_very_large_outputs_a_part_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def counting(expected: Any, got: Any, scale: float, typical_max: float = 0.0) -> Any:
        compared.extend(array.size for array in expected.values())
        return difference(expected, got, scale, typical_max)

    monkeypatch.setattr(evidence_of, "MOST_VALUES", 1000)
    monkeypatch.setattr(evidence_of, "difference", counting)
    evidence, _ = look(lambda x: np.repeat(with_mean(x), 1000, axis=1), ROWS, 1)
    assert evidence.result is Result.DIFFERENT
    assert len(compared) > 2
    assert 500 < max(compared) <= 1001
