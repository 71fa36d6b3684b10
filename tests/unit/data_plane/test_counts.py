"""What becomes of requests is counted once, by how they ended, with the times that they had."""

from __future__ import annotations

from typing import Any

import pytest

from inferq.shared.schema import GpuTimes
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.runs import Finished, Job, Outcome, Run
from inferq.workers.claims.settlement import (
    DEAD_LETTER,
    FAILURE,
    OVERTAKEN,
    REVOKED,
    SUCCESS,
    Settlement,
)
from inferq.workers.data_plane import counts
from inferq.workers.data_plane.counts import (
    MAX_AGE_MS,
    PADDING,
    ROWS,
    SECONDS,
    Counts,
    Histogram,
    ModelCounts,
)
from inferq.workers.data_plane.observers import Settled

#: The present: Redis' clock and the monotonic one, in ms.
REDIS_MS, NOW_MS = 1_000_000.0, 5_000.0
#: Computed from 30 to 10 ms ago, in a batch of 3 rows.
RUN = Run(NOW_MS - 30, NOW_MS - 10, 3, 1, 3, None, 4.0)


def settlement(ending: str | None, *, model: str = "m", **given: Any) -> Settlement:
    claim = Claim("k", model, 0, 1)
    claim.claimed_redis_ms = REDIS_MS - 40
    return Settlement(Slot(claim, 0), model, "id", b"result", ending=ending, **given)


def counted(sent: list[Settlement], *places: int) -> dict[str, ModelCounts]:
    found = {"m": ModelCounts(), "n": ModelCounts()}
    Counts(found).settled(Settled(sent, frozenset(places), NOW_MS, REDIS_MS))
    return found


def test_each_ending_counts_and_what_goes_on_elsewhere_does_not() -> None:
    sent = [settlement(SUCCESS), settlement(None), settlement(REVOKED), settlement(DEAD_LETTER)]
    sent += [settlement(FAILURE, error=code) for code in ("x", "y", "x")]
    sent += [settlement(SUCCESS, model="n"), settlement(SUCCESS)]
    of = counted(sent)
    assert of["m"].outcomes == {SUCCESS: 2, FAILURE: 3, REVOKED: 1, DEAD_LETTER: 1, OVERTAKEN: 0}
    assert of["m"].errors == {"x": 2, "y": 1}
    assert of["m"].total_s.count == 7
    assert of["m"].queue_s.count == of["m"].settle_s.count == 0, "none was computed"
    assert of["n"].outcomes[SUCCESS] == of["n"].total_s.count == 1


def test_what_had_a_result_before_is_told_apart() -> None:
    of = counted([settlement(SUCCESS), settlement(FAILURE, error="x"), settlement(SUCCESS)], 0, 1)
    assert of["m"].outcomes == {SUCCESS: 1, FAILURE: 0, REVOKED: 0, DEAD_LETTER: 0, OVERTAKEN: 2}
    assert of["m"].errors == {}
    assert of["m"].total_s.count == 3


def test_begun_again_counts_what_came_after_the_first_time() -> None:
    of = counted([settlement(SUCCESS, attempts=2), settlement(DEAD_LETTER, attempts=3)])
    assert of["m"].attempts == 4
    assert counted([settlement(None, attempts=1)])["m"].attempts == 0


def test_times_add_up_to_the_whole() -> None:
    sent = [settlement(SUCCESS, sent_ms=REDIS_MS - age, run=RUN) for age in (100, 60, 45)]
    of = counted([*sent, settlement(FAILURE, error="x", sent_ms=REDIS_MS - 100)])["m"]
    assert of.total_s.sum == pytest.approx(0.305)
    assert of.queue_s.sum == pytest.approx(0.070 + 0.030 + 0.015)
    assert of.compute_input_s.sum == pytest.approx(3 * 0.004)
    assert of.compute_infer_s.sum == pytest.approx(3 * 0.016)
    assert of.compute_output_s.sum == 0
    assert of.settle_s.sum == pytest.approx(3 * 0.010)
    for each in (of.queue_s, of.compute_input_s, of.compute_infer_s, of.settle_s):
        assert each.count == 3
    assert of.settle_s.counts[SECONDS.index(0.01)] == 3
    assert of.queue_s.counts[SECONDS.index(0.1)] == 1


def test_runs_of_several_batches_are_not_mixed_up() -> None:
    other = Run(NOW_MS - 9, NOW_MS - 1, 1, 0, 1)
    sent = [settlement(SUCCESS, run=run) for run in (RUN, other, RUN)]
    sent.insert(1, settlement(SUCCESS, model="n", run=other))
    of = counted(sent)
    assert of["m"].settle_s.sum == pytest.approx(0.010 + 0.001 + 0.010)
    assert of["n"].settle_s.sum == pytest.approx(0.001)


@pytest.mark.parametrize(
    "sent_ms",
    [None, float("nan"), float("-inf"), REDIS_MS + 1e6, 0.0, REDIS_MS - MAX_AGE_MS - 1000],
    ids=["none", "no number", "never", "in the future", "1970", "beyond the limit"],
)
def test_who_does_not_say_when_it_was_sent_counts_from_its_claim(
    sent_ms: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "MAX_AGE_MS", REDIS_MS / 2)
    of = counted([settlement(SUCCESS, sent_ms=sent_ms, run=RUN)])["m"]
    assert of.total_s.sum == pytest.approx(0.040)
    assert of.queue_s.sum == pytest.approx(0.010)


def test_a_clock_that_was_set_back_makes_no_negative_time() -> None:
    of = {"m": ModelCounts()}
    done = Settled([settlement(SUCCESS, run=RUN)], frozenset(), NOW_MS, REDIS_MS - 50)
    Counts(of).settled(done)
    assert of["m"].total_s.sum == of["m"].queue_s.sum == 0
    assert of["m"].total_s.counts[0] == of["m"].queue_s.counts[0] == 1


def test_a_batch_counts_once_and_each_piece_that_was_run_by_itself() -> None:
    def ended(*runs: Run | None) -> ModelCounts:
        outcomes: list[Any] = [
            Outcome(None, {}, run)  # type: ignore[arg-type]
            for run in runs
            for _ in range(run.requests if run else 1)
        ]
        of = ModelCounts()
        of.ended(Finished(Job([], {}), outcomes, began=1.0, ended=1.5))
        return of

    whole = ended(RUN)
    assert (whole.batches, whole.rows, whole.padding_rows) == (1, 3, 1)
    halves = ended(RUN, None, Run(0.0, 1.0, 17, 15, 2), None, Run(0.0, 1.0, 2000, 0, 1))
    assert (halves.batches, halves.rows, halves.padding_rows) == (3, 2020, 16)
    assert halves.batch_size.sum == 2020
    assert halves.batch_size.counts[ROWS.index(32)] == halves.batch_size.counts[-1] == 1
    assert halves.padding.counts[PADDING.index(0)] == halves.padding.counts[PADDING.index(16)] == 1
    assert halves.busy_s == 0.5
    assert ended().batches == 0


def test_a_runs_time_on_a_gpu_is_split_by_the_cards_clock() -> None:
    gpu = GpuTimes(h2d_ms=2.0, compute_ms=9.0, d2h_ms=3.0)
    assert Run(0.0, 20.0, 1, 0, 1, gpu, 1.0).split_s == pytest.approx((0.003, 0.009, 0.008))
    assert Run(0.0, 10.0, 1, 0, 1, gpu, 1.0).split_s == pytest.approx((0.003, 0.009, 0.0))
    assert Run(0.0, 20.0, 1, 0, 1, None, 5.0).split_s == pytest.approx((0.005, 0.015, 0.0))


def test_quantiles_are_interpolated_within_their_bucket() -> None:
    seen = Histogram([0, 10, 0, 10, 0])
    bounds = (1.0, 2.0, 4.0, 8.0)
    assert seen.quantile(0.0, bounds) == 1.0
    assert seen.quantile(0.25, bounds) == 1.5
    assert seen.quantile(0.5, bounds) == 2.0
    assert seen.quantile(0.75, bounds) == 6.0
    assert seen.quantile(1.0, bounds) == 8.0
    assert Histogram([0, 0, 3]).quantile(0.5, (1.0, 2.0)) == 2.0
    assert Histogram([0, 0]).quantile(0.5, (1.0,)) is None
