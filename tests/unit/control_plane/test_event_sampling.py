"""Above the cap of task events some requests are left out: evenly, and the same in all workers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np
import pytest

from inferq.shared.schema import Ticket
from inferq.workers.batching.waiting import Waiting
from inferq.workers.control_plane.event_sampling import Sampler


def requests(count: int, *, alone: bool = False, seed: int = 0) -> list[Waiting]:
    numbers = np.random.default_rng(seed)
    ids = [str(uuid.UUID(bytes=numbers.bytes(16))) for _ in range(count)]
    return [
        Waiting(
            ticket=Ticket(request_id, "m", "", attempts=int(alone)),
            inputs={},
            slot=None,
            compatible=None,
            arrived_mono_ms=0.0,
            claimed_redis_ms=0.0,
            rows=1,
            alone=alone,
        )
        for request_id in ids
    ]


def load(sampler: Sampler, per_s: int, seconds: int, batch: int) -> Iterator[list[str]]:
    """What is chosen in each second of a steady load."""
    items = iter(requests(per_s * seconds, seed=per_s))
    batches = per_s // batch
    for second in range(1, seconds + 1):
        chosen = []
        for n in range(batches):
            now = second + n / batches
            some = [next(items) for _ in range(batch)]
            chosen += [item.ticket.id for item in sampler.choose(some, now)]
        yield chosen


def test_all_are_chosen_below_the_cap() -> None:
    sampler = Sampler(500)
    assert [len(each) for each in load(sampler, 400, 5, 8)] == [400] * 5
    assert sampler.left_out == 0


def test_as_many_as_in_a_second_may_come_at_once() -> None:
    sampler = Sampler(500)
    assert len(sampler.choose(requests(500), 100.0)) == 500
    assert len(sampler.choose(requests(500), 100.0)) == 0
    assert len(sampler.choose(requests(500), 100.25)) == 125
    assert sampler.left_out == 875


@pytest.mark.parametrize("batch", [1, 30, 1000])
def test_a_heavy_load_is_cut_to_the_cap(batch: int) -> None:
    sampler = Sampler(400)
    chosen = [len(each) for each in load(sampler, 6_000, 4, batch)]
    assert sum(chosen) <= 400 * 5
    assert all(320 <= each <= 480 for each in chosen[1:]), chosen
    assert sampler.left_out == 24_000 - sum(chosen)


def test_workers_under_the_same_load_choose_the_same() -> None:
    """So a request that one hands back is told of by the next."""
    first, second = (list(load(Sampler(400), 6_000, 3, batch)) for batch in (30, 50))
    one, other = set(first[2]), set(second[2])
    assert len(one & other) > 0.8 * len(one | other)


def test_what_ended_a_worker_is_always_chosen() -> None:
    sampler = Sampler(0)
    assert sampler.choose(requests(5), 10.0) == []
    suspects = requests(3, alone=True)
    assert sampler.choose([*requests(5), *suspects], 10.0) == suspects


def test_after_a_heavy_load_all_are_chosen_again() -> None:
    sampler = Sampler(100)
    list(load(sampler, 10_000, 3, 100))
    sampler.choose(requests(10), 6.0)
    assert len(sampler.choose(requests(50), 8.0)) == 50
