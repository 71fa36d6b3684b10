"""What is formed ahead of the lanes, what is claimed for them, and what runs by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers.repository import fake_model
from helpers.served import served_model
from helpers.wait import until

from inferq.shared.schema import Ticket
from inferq.workers.audit.audit import Mismatch
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Want
from inferq.workers.claims.fenced import HINT, QueueId
from inferq.workers.claims.runs import Job
from inferq.workers.data_plane import reporting, scheduling
from inferq.workers.data_plane.budget import Budget
from inferq.workers.data_plane.served_model import AHEAD_S, MAX_AHEAD, ServedModel

LANES, TARGET = 2, 4
STEPS = (0, 3, 6, 9)
KNOBS = f"lanes = {LANES}\nmax_batch_size = {TARGET}\nwarm_up = false"


def served(root: Path, name: str) -> ServedModel:
    fake_model(root, name, knobs=KNOBS, fake="delay_ms = 300.0")
    return served_model(root, name)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ServedModel]:
    """Its batches are formed but not put, unless a test does so: the lanes stay where they are."""
    model = served(tmp_path, "m")
    yield model
    model.close(10)


def add(model: ServedModel, count: int, *, priority: int = 0, suspect: bool = False) -> None:
    for _ in range(count):
        model.add(
            Waiting(
                ticket=Ticket(f"{priority}", model.name, "", priority=priority),
                inputs={"x": np.zeros((1, 4), np.float32)},
                slot=None,
                compatible=None,
                arrived_mono_ms=0.0,
                claimed_redis_ms=0.0,
                rows=1,
                alone=suspect,
            )
        )


def form(*models: ServedModel) -> list[tuple[str, list[int]]]:
    """What leaves: each batch's model and its requests' priorities."""
    leaving = scheduling.next_batches(models, 1000.0)
    return [(model.name, [item.ticket.priority for item in job.items]) for model, job in leaving]


def wants(
    model: ServedModel, depths: Mapping[QueueId, int | None], ending: int = 0
) -> tuple[list[Want], list[QueueId]]:
    """What is claimed where memory is no matter."""
    return scheduling.wants([model], depths, ending, Budget([model], 1 << 50))


def settle_down(model: ServedModel, batch_s: float) -> None:
    """Let it have computed one batch in `batch_s` seconds."""
    job = Job([], {})
    model.jobs.append(job)
    model.ended(job, batch_s)


def full(priority: int = 0) -> tuple[str, list[int]]:
    return ("m", [priority] * TARGET)


def test_one_full_batch_is_formed_ahead_of_each_busy_lane(model: ServedModel) -> None:
    add(model, 5 * TARGET)
    assert form(model) == [full()] * 2 * LANES
    assert len(model.waiting) == TARGET
    assert form(model) == []


def test_requests_that_lack_company_wait_for_it_until_a_lane_is_free(model: ServedModel) -> None:
    add(model, 2 * TARGET + TARGET - 1)
    assert form(model) == [full()] * LANES
    assert len(model.waiting) == TARGET - 1
    model.ended(model.jobs[0])
    assert form(model) == [("m", [0] * (TARGET - 1))]


@pytest.mark.parametrize(
    ("batch_s", "depth"),
    [(60.0, 1), (AHEAD_S, 1), (AHEAD_S / 2, 2), (AHEAD_S / 5, 5), (1e-6, MAX_AHEAD)],
)
def test_the_shorter_the_batches_the_more_are_formed_ahead(
    model: ServedModel, batch_s: float, depth: int
) -> None:
    settle_down(model, batch_s)
    assert model.room() == dict.fromkeys(STEPS, LANES * depth * TARGET)
    add(model, 1000)
    assert len(form(model)) == LANES * (1 + depth)


def test_one_slow_batch_is_believed_at_once_and_short_ones_only_by_and_by(
    model: ServedModel,
) -> None:
    settle_down(model, 1e-3)
    settle_down(model, 1.0)
    assert model.room()[0] == LANES * TARGET
    settle_down(model, 1e-3)
    assert model.room()[0] == LANES * TARGET
    for _ in range(200):
        settle_down(model, 1e-3)
    assert model.room()[0] == LANES * MAX_AHEAD * TARGET


def test_what_computes_takes_no_room_and_what_waits_does(model: ServedModel) -> None:
    add(model, LANES * TARGET)
    form(model)
    assert model.room()[0] == LANES * TARGET
    add(model, TARGET + 1)
    form(model)
    assert model.room()[0] == LANES * TARGET - TARGET - 1


def test_less_urgent_requests_take_no_room_from_more_urgent_ones(model: ServedModel) -> None:
    add(model, 100, priority=6)
    form(model)
    assert model.room() == {0: LANES * TARGET, 3: LANES * TARGET, 6: 0, 9: 0}


def test_it_claims_what_is_there_and_hears_of_queues_that_it_has_room_for(
    model: ServedModel,
) -> None:
    depths: dict[tuple[str, int], int | None] = {("m", 0): 3, ("m", 3): 100, ("m", 6): 5}
    wanted, listen = wants(model, depths)
    assert wanted == [Want("m", 0, 3), Want("m", 3, LANES * TARGET - 3)]
    assert listen == [("m", 0)]
    assert wants(model, {}) == ([], [("m", step) for step in STEPS])


@pytest.mark.parametrize(("ending", "count"), [(0, HINT), (HINT + 2, HINT + 2), (99, 8)])
def test_of_a_queue_that_was_not_looked_at_it_claims_as_many_as_end(
    model: ServedModel, ending: int, count: int
) -> None:
    wanted, _ = wants(model, {("m", 0): None}, ending)
    assert wanted == [Want("m", 0, count)]


def test_nothing_is_claimed_from_a_queue_that_is_not_consumed(model: ServedModel) -> None:
    model.consuming = False
    assert wants(model, {("m", 0): 5}) == ([], [])


def test_amply_supplied_it_asks_for_more_urgent_requests_only(model: ServedModel) -> None:
    settle_down(model, AHEAD_S / 4)
    depths: dict[tuple[str, int], int | None] = {("m", step): 1 for step in STEPS}
    add(model, (LANES + LANES) * TARGET, priority=6)
    form(model)
    assert model.has_enough_ahead()
    wanted, listen = wants(model, depths)
    assert wanted == [Want("m", 0, 1), Want("m", 3, 1)]
    assert listen == [("m", 0), ("m", 3)]
    model.ended(model.jobs[0])
    assert not model.has_enough_ahead()
    assert Want("m", 6, 1) in wants(model, depths)[0]


def test_with_one_batch_ahead_of_each_lane_it_is_never_amply_supplied(model: ServedModel) -> None:
    settle_down(model, 1.0)
    add(model, 1000)
    form(model)
    assert not model.has_enough_ahead()


def test_a_more_urgent_request_overtakes_batches_that_no_lane_has_begun(
    model: ServedModel,
) -> None:
    add(model, LANES * TARGET, priority=9)
    for _, job in scheduling.next_batches([model], 1000.0):
        model.put(job)
    until(lambda: len(model.computing()) == LANES)
    add(model, LANES * TARGET, priority=9)
    for _, job in scheduling.next_batches([model], 1000.0):
        model.put(job)
    assert not model.overtaken()
    assert len(model.reserved()) == LANES * TARGET
    add(model, 1)
    assert model.overtaken()
    assert len(model.reserved()) == LANES * TARGET + 1
    assert len(model.recall()) == LANES * TARGET
    assert not model.overtaken()
    assert len(model.jobs) == LANES, "what computes cannot be recalled"
    assert form(model) == [("m", [0, *[9] * (TARGET - 1)]), full(9)]


def test_nothing_less_urgent_is_formed_ahead_of_requests_that_lack_company(
    model: ServedModel,
) -> None:
    add(model, LANES * TARGET, priority=9)
    assert form(model) == [full(9)] * LANES
    add(model, 1, priority=3)
    add(model, 2 * TARGET, priority=9)
    model.waiting.items[0].compatible = "odd"
    assert form(model) == []
    model.ended(model.jobs[0])
    assert form(model) == [("m", [3]), full(9), full(9)]


def test_a_suspect_computes_while_nothing_else_does_on_no_lane_of_any_model(
    model: ServedModel, tmp_path: Path
) -> None:
    other = served(tmp_path, "other")
    add(other, 1)
    assert form(model, other) == [("other", [0])]
    add(model, 1, suspect=True)
    add(model, TARGET)
    add(other, 1)
    assert form(model, other) == []
    other.ended(other.jobs[0])
    assert form(model, other) == [("m", [0])]
    assert form(model, other) == []
    model.ended(model.jobs[0])
    assert form(model, other) == [full(), ("other", [0])]
    other.close(10)


# --- audits --------------------------------------------------------------------------------------


def test_a_suspect_waits_for_the_end_of_an_audit_and_none_begins_beside_it(
    model: ServedModel, tmp_path: Path
) -> None:
    other = served(tmp_path, "other")
    other.audit.since = 1.0
    add(model, 1, suspect=True)
    assert form(model, other) == []
    other.audit.since = None
    assert form(model, other) == [("m", [0])]
    assert model.audit.held
    assert other.audit.held
    add(model, 1)
    assert form(model, other) == []
    model.ended(model.jobs[0])
    assert form(model, other) == [("m", [0])]
    assert not model.audit.held
    assert not other.audit.held
    other.close(10)


def test_a_model_that_an_audit_found_out_forms_batches_of_one_request(model: ServedModel) -> None:
    model.audit.mismatch, model.audit.unbatched = Mismatch("output 'y' differs", 4, 10), True
    settle_down(model, 1.0)
    add(model, 3 * LANES)
    assert form(model) == [("m", [0])] * 2 * LANES
    assert len(model.waiting) == LANES
    assert model.room()[0] == 0
    stats = reporting.stats(model)
    assert (stats.target_batch_size, stats.unbatched) == (1, True)
    assert stats.mismatch == model.audit.mismatch


def test_an_audit_that_takes_longer_than_a_batch_may_is_overdue(model: ServedModel) -> None:
    model.audit.since = time.monotonic()
    assert not model.overdue()
    model.audit.since -= model.spec.config.max_run_seconds + 1
    assert model.overdue()
    assert model.computing() == []
