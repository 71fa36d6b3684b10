"""When batches leave and who is in them: by table, and by simulating any sequence of events."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferq.workers.batching.policy import MAX_OVERTAKES, Knobs, Leave, Wait, decide

NOW = 1000.0


@dataclass
class Request:
    rows: int = 1
    compatible: Hashable = None
    alone: bool = False
    arrived_mono_ms: float = NOW
    overtaken: int = 0
    priority: int = 0
    number: int = 0


def ones(count: int, **given: float) -> list[Request]:
    return [Request(**given) for _ in range(count)]  # type: ignore[arg-type]


def of_rows(*rows: int) -> list[Request]:
    return [Request(rows=n) for n in rows]


def taken(
    waiting: Sequence[Request], knobs: Knobs, *, free: int = 1, now: float = NOW
) -> tuple[int, ...] | float | None:
    """The indices that leave, or when to look again, or None."""
    decision = decide(waiting, free, now, knobs)
    if isinstance(decision, Wait):
        return decision.until_mono_ms
    return decision.take if decision else None


FOUR = Knobs(max_batch_size=4)
DELAY = Knobs(max_batch_size=4, max_queue_delay_ms=10)
PREFERRED = Knobs(max_batch_size=8, preferred_batch_sizes=(2, 4), max_queue_delay_ms=10)
SPREAD = Knobs(max_batch_size=8, spread=True)
X, Y = Request(compatible="x"), Request(compatible="y")
ALONE = Request(alone=True)


@pytest.mark.parametrize(
    ("waiting", "knobs", "expected"),
    [
        ([], FOUR, None),
        (ones(1), FOUR, (0,)),
        (ones(9), FOUR, (0, 1, 2, 3)),
        (of_rows(3, 1, 1), FOUR, (0, 1)),
        (of_rows(3, 2, 1), FOUR, (0, 2)),
        (of_rows(3, 2, 2), FOUR, (0,)),
        (of_rows(9, 1), FOUR, (0,)),
        (of_rows(1, 9, 1, 1, 1), FOUR, (0, 2, 3, 4)),
        ([X, Y, X], FOUR, (0, 2)),
        ([ALONE, X], FOUR, (0,)),
        ([X, ALONE, X], FOUR, (0, 2)),
        (ones(3), Knobs(max_batch_size=4, batchable=False), (0,)),
        (ones(3), Knobs(max_batch_size=1), (0,)),
    ],
)
def test_without_a_delay_what_fits_leaves_at_once(
    waiting: list[Request], knobs: Knobs, expected: tuple[int, ...] | None
) -> None:
    assert taken(waiting, knobs) == expected


@pytest.mark.parametrize(
    ("waiting", "knobs", "now", "expected"),
    [
        (ones(1), DELAY, NOW, NOW + 10),
        (ones(3), DELAY, NOW + 9.9, NOW + 10),
        (ones(3), DELAY, NOW + 10, (0, 1, 2)),
        (ones(4), DELAY, NOW, (0, 1, 2, 3)),
        (of_rows(3, 2), DELAY, NOW, (0,)),
        (
            [Request(arrived_mono_ms=NOW + 5), Request(arrived_mono_ms=NOW)],
            DELAY,
            NOW + 9,
            NOW + 10,
        ),
        ([Request(arrived_mono_ms=NOW + 5), Request(arrived_mono_ms=NOW)], DELAY, NOW + 10, (0, 1)),
        ([ALONE], DELAY, NOW, (0,)),
        ([X, ALONE], DELAY, NOW, NOW + 10),
        (ones(1), PREFERRED, NOW, NOW + 10),
        (ones(2), PREFERRED, NOW, (0, 1)),
        (ones(3), PREFERRED, NOW, (0, 1)),
        (ones(3), PREFERRED, NOW + 10, (0, 1, 2)),
        (of_rows(1, 2), PREFERRED, NOW, NOW + 10),
        (ones(5), PREFERRED, NOW, (0, 1, 2, 3)),
    ],
)
def test_a_delay_is_waited_for_company_from_the_oldest_arrival_on(
    waiting: list[Request], knobs: Knobs, now: float, expected: tuple[int, ...] | float
) -> None:
    assert taken(waiting, knobs, now=now) == expected


def test_a_group_that_waits_for_company_keeps_no_lane_from_those_behind_it() -> None:
    old_y = Request(compatible="y", arrived_mono_ms=NOW - 10)
    assert taken([X, old_y], DELAY) == (1,)
    assert taken([X, *[Y] * 4], DELAY) == (1, 2, 3, 4)
    assert taken([X, Request(compatible="y", arrived_mono_ms=NOW - 4)], DELAY) == NOW + 6


@pytest.mark.parametrize("count", [1, 3])
def test_spreading_over_lanes_does_not_shorten_the_delay(count: int) -> None:
    knobs = Knobs(max_batch_size=8, max_queue_delay_ms=10, spread=True)
    assert taken(ones(count), knobs, free=4) == NOW + 10
    assert taken(ones(count), knobs, free=4, now=NOW + 10) == (0,)


@pytest.mark.parametrize(
    ("waiting", "free", "expected"),
    [
        (ones(8), 1, 8),
        (ones(8), 2, 4),
        (ones(9), 2, 5),
        (ones(3), 4, 1),
        (ones(40), 2, 8),
        (of_rows(6, 1, 1), 2, 6),
        (of_rows(1, 6, 1), 2, 2),
    ],
)
def test_waiting_rows_are_spread_over_free_lanes(
    waiting: list[Request], free: int, expected: int
) -> None:
    decision = decide(waiting, free, NOW, SPREAD)
    assert isinstance(decision, Leave)
    assert decision.rows == expected


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 4), (4, 4), (5, 8)])
def test_a_batch_runs_at_the_next_bucket(rows: int, bucket: int) -> None:
    decision = decide(ones(rows), 1, NOW, Knobs(max_batch_size=8, buckets=(1, 4, 8)))
    assert isinstance(decision, Leave)
    assert (decision.rows, decision.bucket) == (rows, bucket)


def test_nothing_leaves_while_no_lane_is_free() -> None:
    assert taken(ones(9), FOUR, free=0) is None


def test_at_most_eight_smaller_ones_overtake_each_that_does_not_fit() -> None:
    """Also the second that does not fit, which stands behind the first."""
    knobs = Knobs(max_batch_size=100)
    waiting = [*of_rows(50, 60, 70), *ones(20)]
    assert taken(waiting, knobs) == (0, *range(3, 3 + MAX_OVERTAKES))
    waiting[2].overtaken = MAX_OVERTAKES - 1
    assert taken(waiting, knobs) == (0, 3)
    waiting[1].overtaken = MAX_OVERTAKES
    assert taken(waiting, knobs) == (0,)


# --- any sequence of events ----------------------------------------------------------------------

KNOBS = st.builds(
    Knobs,
    max_batch_size=st.just(8),
    preferred_batch_sizes=st.sampled_from([(), (4,), (2, 4), (8,)]),
    max_queue_delay_ms=st.sampled_from([0.0, 5.0]),
    buckets=st.sampled_from([(), (1, 4, 8)]),
    batchable=st.sampled_from([True, True, True, False]),
    spread=st.booleans(),
)
REQUEST = st.builds(
    Request,
    rows=st.sampled_from([1, 1, 1, 2, 3, 5, 8]),
    compatible=st.sampled_from("aab"),
    alone=st.sampled_from([False] * 9 + [True]),
    priority=st.sampled_from([0, 3, 3]),
)


class Simulation:
    """Requests arrive, lanes get free, time passes; what leaves is checked against the promises."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.now = 0.0
        self.waiting: list[Request] = []
        self.arrived = self.left = 0
        self.passed: dict[int, int] = {}

    def arrive(self, request: Request) -> None:
        number = self.arrived
        self.arrived += 1
        new = Request(
            request.rows, request.compatible, request.alone, self.now, 0, request.priority, number
        )
        self.waiting.append(new)
        self.waiting.sort(key=lambda r: (r.priority, r.number))

    def form(self, free: int) -> None:
        while free and self.waiting:
            decision = decide(self.waiting, free, self.now, self.knobs)
            if isinstance(decision, Wait):
                self._may_wait(decision)
                return
            assert isinstance(decision, Leave)
            self._leave(decision)
            free -= 1

    def _may_wait(self, wait: Wait) -> None:
        assert self.now < wait.until_mono_ms < math.inf
        assert not self.waiting[0].alone
        for request in self.waiting:
            if request.alone:
                continue  # its turn is when it is first
            assert wait.until_mono_ms <= request.arrived_mono_ms + self.knobs.max_queue_delay_ms

    def _leave(self, leave: Leave) -> None:
        assert list(leave.take) == sorted(set(leave.take))
        batch = [self.waiting[index] for index in leave.take]
        rows = sum(request.rows for request in batch)
        assert leave.rows == rows <= leave.bucket
        if len(batch) > 1:
            assert rows <= self.knobs.target
            assert self.knobs.batchable
            assert not any(request.alone for request in batch)
            assert len({request.compatible for request in batch}) == 1
        for index, request in enumerate(self.waiting[: leave.take[-1]]):
            if index in leave.take or request.alone or not self.knobs.batchable:
                continue
            if request.compatible != batch[0].compatible:
                continue
            later = sum(i > index for i in leave.take)
            self.passed[request.number] = self.passed.get(request.number, 0) + later
            assert self.passed[request.number] <= MAX_OVERTAKES
        for index, times in leave.overtaken.items():
            self.waiting[index].overtaken += times
        if leave.take[0] != 0:  # only those who wait for company are passed over
            head = self.waiting[0]
            assert self.now < head.arrived_mono_ms + self.knobs.max_queue_delay_ms
        self.waiting = [r for i, r in enumerate(self.waiting) if i not in leave.take]
        self.left += len(batch)


EVENTS = st.lists(REQUEST | st.integers(0, 3) | st.sampled_from([0.5, 4.0, 6.0]), max_size=60)


@settings(max_examples=300)
@given(KNOBS, EVENTS)
def test_whatever_happens_every_promise_holds_and_every_request_leaves_once(
    knobs: Knobs, events: list[Request | int | float]
) -> None:
    simulation = Simulation(knobs)
    for event in events:
        if isinstance(event, Request):
            simulation.arrive(event)
        elif isinstance(event, int):
            simulation.form(event)
        else:
            simulation.now += event
    simulation.now += 1000
    for _ in range(simulation.arrived):
        simulation.form(1)
    assert simulation.waiting == []
    assert simulation.left == simulation.arrived


@settings(max_examples=50)
@given(KNOBS, st.integers(1, 3), REQUEST)
def test_no_request_starves_while_smaller_ones_keep_coming(
    knobs: Knobs, free: int, request: Request
) -> None:
    simulation = Simulation(knobs)
    simulation.arrive(Request(rows=1, compatible=request.compatible, priority=request.priority))
    simulation.arrive(request)
    batches = 0
    while any(r.number == 1 for r in simulation.waiting):
        for _ in range(10):
            simulation.arrive(
                Request(rows=1, compatible=request.compatible, priority=request.priority)
            )
        simulation.now += 10
        simulation.form(free)
        batches += free
        assert batches <= 3 * MAX_OVERTAKES
