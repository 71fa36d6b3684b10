"""How many bytes of requests a worker claims: of each model, and of all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers.responder import advert

from inferq.shared.schema import Signature, TensorSpec, Ticket
from inferq.shared.text import HELD_EACH
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.fenced import QueueId
from inferq.workers.claims.payloads import _blocks
from inferq.workers.claims.verdicts import Opened
from inferq.workers.data_plane import scheduling
from inferq.workers.data_plane.budget import (
    MAX_BUDGET_BYTES,
    READING_S,
    Budget,
    Sizes,
    beside_bytes,
    budget_bytes,
)
from inferq.workers.data_plane.unfetched import (
    Backlog,
    Unfetched,
    beside_payloads,
    payload_sizes,
)

MB = 1024 * 1024
STEPS = (0, 3, 6, 9)
ROOM = 64


def sizes(columns: int | None, most: int = 64 * MB) -> Sizes:
    """Of a model of rows with so many float32; None: any number."""
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", columns))
    signature = Signature(inputs=(spec,), outputs=(spec,))
    return Sizes(advert(signature=signature, max_batch_size=32, max_request_bytes=most))


@dataclass
class Model:
    """As far as `scheduling.wants` looks at one: there is room for 64 rows, of any priority."""

    name: str = "m"
    sizes: Sizes = field(default_factory=lambda: sizes(4 * MB))
    consuming: bool = True

    def room(self) -> dict[int, int]:
        return dict.fromkeys(STEPS, ROOM)

    def has_enough_ahead(self) -> bool:
        return False


def seen(model: Model, inputs: float, outputs: int) -> Model:
    """A model of which requests of this size were served."""
    model.sizes.claimed(inputs)
    model.sizes.computed({"x": np.empty(int(inputs), np.uint8)}, {"x": np.empty(outputs, np.uint8)})
    return model


def wanted(
    models: list[Model], depths: Mapping[QueueId, int | None], budget: Budget
) -> dict[QueueId, int]:
    wants, _ = scheduling.wants(models, depths, 0, budget)  # type: ignore[arg-type]
    return {(want.model, want.step): want.count for want in wants}


def claimed(budget: Budget, name: str, count: int, each: int, step: int = 0) -> Claim:
    claim = Claim(f"{name}-{step}", name, step, count)
    whole = budget._shares[name].model.sizes.whole(each)
    budget.claimed(claim, range(count), count * each, dict.fromkeys(range(count), whole))
    return claim


def settle(budget: Budget, claim: Claim, count: int) -> None:
    left = [place for place in range(claim.size) if place not in claim.settled]
    claim.settled.update(left[:count])
    budget.settled(claim)


def test_large_requests_are_claimed_as_far_as_their_bytes_and_their_results_fit() -> None:
    model = seen(Model(), 16 * MB, 16 * MB)
    budget = Budget([model], 512 * MB)
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): 16}
    claim = claimed(budget, "m", 12, 16 * MB)
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): 4}
    settle(budget, claim, 5)
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): 9}
    settle(budget, claim, 7)
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): 16}


@pytest.mark.parametrize(("inputs", "outputs"), [(3_000, 40), (150_000, 150_000)])
def test_of_ordinary_requests_as_many_are_claimed_as_the_lanes_take(
    inputs: int, outputs: int
) -> None:
    model = seen(Model(), inputs, outputs)
    budget = Budget([model], 512 * MB)
    claimed(budget, "m", 17 * ROOM, inputs)  # computing, and formed as far ahead as can be
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): ROOM}


def test_until_sizes_are_known_requests_count_as_large_as_they_may_be() -> None:
    fixed, varying = Model("m", sizes(4 * MB)), Model("m", sizes(None))
    for model in (fixed, varying):
        few = wanted([model], {("m", 0): 100}, Budget([model], 512 * MB))[("m", 0)]
        assert 1 <= few <= 8
    small = Model("m", sizes(750))
    assert wanted([small], {("m", 0): 100}, Budget([small], 512 * MB)) == {("m", 0): ROOM}


def test_one_large_claim_is_believed_at_once_and_small_ones_by_and_by() -> None:
    model = seen(Model(), 1_000, 0)
    budget = Budget([model], 512 * MB)
    for _ in range(2):
        settle(budget, claimed(budget, "m", 1, 16 * MB), 1)
        assert wanted([model], {("m", 0): 100}, budget)[("m", 0)] == 32
        settle(budget, claimed(budget, "m", 1, 1_000), 1)
        assert 32 < wanted([model], {("m", 0): 100}, budget)[("m", 0)] < 40
        for _ in range(60):
            settle(budget, claimed(budget, "m", 1, 1_000), 1)
        assert wanted([model], {("m", 0): 100}, budget)[("m", 0)] == ROOM


def test_requests_that_take_long_to_read_are_claimed_a_few_at_a_time() -> None:
    """One claim of them is believed at once, as with bytes; one request is claimed in any case."""
    model = seen(Model(), 1_000, 1_000)
    budget = Budget([model], 512 * MB)

    def count() -> int:
        return wanted([model], {("m", 0): 100}, budget)[("m", 0)]

    assert count() == ROOM
    model.sizes.read(READING_S / 10)
    assert count() == 10
    model.sizes.read(10 * READING_S)
    assert count() == 1
    for _ in range(200):
        model.sizes.read(1e-5)
    assert count() == ROOM


def test_large_outputs_of_small_requests_count_too() -> None:
    model = seen(Model(), 1_000, 64 * MB)
    assert wanted([model], {("m", 0): 100}, Budget([model], 512 * MB)) == {("m", 0): 7}


def test_where_outputs_grow_with_inputs_those_of_unusual_requests_are_foreseen() -> None:
    growing, fixed = sizes(None), sizes(4 * MB)
    for each in (growing, fixed):
        each.computed({"x": np.empty(1_000, np.uint8)}, {"y": np.empty(3_000, np.uint8)})
        assert each.whole(1_000) == 4_000
        assert each.whole(10) == 3_010
    assert growing.whole(MB) == 4 * MB
    assert fixed.whole(MB) == MB + 3_000


def test_one_request_is_claimed_however_large_it_is_and_no_second_one_beside_it() -> None:
    model = seen(Model(), 900 * MB, 900 * MB)
    budget = Budget([model], 512 * MB)
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): 1}
    claim = claimed(budget, "m", 1, 900 * MB)
    assert wanted([model], {("m", 0): 100}, budget) == {}
    settle(budget, claim, 1)
    assert wanted([model], {("m", 0): 100}, budget) == {("m", 0): 1}


def test_a_more_urgent_request_is_let_in_beside_large_ones() -> None:
    model = seen(Model(), 16 * MB, 16 * MB)
    budget = Budget([model], 512 * MB)
    claimed(budget, "m", 16, 16 * MB, step=6)
    depths: dict[QueueId, int | None] = {("m", step): 10 for step in STEPS}
    assert wanted([model], depths, budget) == {("m", 0): 1}
    claimed(budget, "m", 1, 16 * MB, step=0)
    assert wanted([model], depths, budget) == {}


def test_a_models_large_requests_leave_the_others_their_part() -> None:
    large = seen(Model("large"), 16 * MB, 16 * MB)
    others = [seen(Model(f"small{n}"), 150_000, 150_000) for n in range(3)]
    models = [large, *others]
    budget = Budget(models, 512 * MB)
    first = wanted(models, {("large", 0): 100}, budget)[("large", 0)]
    assert first == (64 + 256) // 32
    claimed(budget, "large", 100, 16 * MB)  # as if it had been wrong
    depths: dict[QueueId, int | None] = {(model.name, 0): 100 for model in models}
    assert wanted(models, depths, budget) == {(each.name, 0): ROOM for each in others}


def test_one_round_trip_gives_the_common_part_away_once() -> None:
    models = [seen(Model(f"m{n}"), 4 * MB, 4 * MB) for n in range(8)]
    depths: dict[QueueId, int | None] = {(model.name, 0): 100 for model in models}
    counts = wanted(models, depths, Budget(models, 512 * MB))
    assert sum(counts.values()) * 8 * MB <= 512 * MB
    assert min(counts.values()) == 256 // 8 // 8


def test_what_is_counted_in_is_counted_out_to_the_byte() -> None:
    models = [seen(Model(f"m{n}"), 7_777_777, 3_333) for n in range(3)]
    budget = Budget(models, 64 * MB)
    rng = np.random.default_rng(1)
    claims = []
    for n in range(200):
        claim = Claim(str(n), f"m{n % 3}", int(rng.choice(STEPS)), int(rng.integers(1, 9)))
        claim.settled = set(range(int(rng.integers(0, claim.size + 1))))
        places = [place for place in range(claim.size) if place not in claim.settled]
        whole = {place: 10**7 + place for place in places[::2]}
        budget.claimed(claim, places, int(rng.integers(0, 10**6)), whole)
        claims.append(claim)
    for claim in claims[::5]:  # Redis went back: some that were settled are not any more
        again = sorted(claim.settled)[1:]
        claim.settled.difference_update(again)
        budget.claimed(claim, again, 10**6, dict.fromkeys(again[::3], 10**6))
    assert budget.common_left() == 0
    while claims:
        claim = claims[int(rng.integers(len(claims)))]
        settle(budget, claim, 1)
        if claim.complete:
            assert not claim.whole
            claims.remove(claim)
    assert budget.common_left() == 32 * MB
    for model in models:
        assert budget.own_left(model.name) == 64 * MB // 2 // 3
        assert all(budget.idle(model.name, step) for step in STEPS)


def test_the_budget_follows_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (1 << 30) // 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert budget_bytes() == 64 * MB
    pages["SC_PHYS_PAGES"] *= 256
    assert budget_bytes() == MAX_BUDGET_BYTES


# --- payloads that stay in Redis ----------------------------------------------------------------


def opened(
    place: int, priority: int = 0, shape: object = (1, 4), dtype: str = "<f4", **more: object
) -> Opened:
    ticket = Ticket(str(place), "m", "", priority=priority)
    tensor = {"dtype": dtype, "shape": shape, "key": f"key{place}", **more}
    slot = Slot(Claim("c", "m", priority, 1), place)
    return Opened(slot, ticket, {"x": tensor}, {"x": f"key{place}"})


def test_what_a_message_says_of_its_payload_tells_how_large_it_is() -> None:
    assert payload_sizes(opened(0, shape=[3, 4])) == {"key0": 48}
    for shape in (None, "3", [3, -1], [3, "4"], [True]):
        assert payload_sizes(opened(0, shape=shape)) == {"key0": 0}
    assert payload_sizes(opened(0, dtype="O")) == {"key0": 0}


def test_a_payload_of_text_says_itself_how_large_it_is() -> None:
    assert payload_sizes(opened(0, dtype="string", size=48)) == {"key0": 48}
    for size in (None, -1, "48", True):
        assert payload_sizes(opened(0, dtype="bytes", size=size)) == {"key0": 0}


def test_text_counts_with_what_its_elements_take_in_memory() -> None:
    text = np.array(["a"] * 1000, object)
    assert beside_bytes({"x": text, "y": np.zeros(1000)}) == 1000 * HELD_EACH
    checked = opened(0, dtype="string", shape=[1000], size=5004)
    assert beside_payloads(checked) == 1000 * HELD_EACH
    lying = opened(0, dtype="string", shape=[2**40, 2**40], size=5004)
    assert beside_payloads(lying) <= 5004 // 4 * HELD_EACH
    assert beside_payloads(opened(0, dtype="string", shape=[2**63] * 300_000, size=8)) == 0
    assert beside_payloads(opened(0, shape=[3, 4])) == 0
    spec = TensorSpec("x", "string", ("batch",))
    known = Sizes(advert(signature=Signature((spec,), (spec,)), max_request_bytes=10 * MB))
    assert known.of_text
    assert known.inputs == 10 * MB
    known.computed({"x": text}, {"x": text})
    assert known.outputs == 1000 * (HELD_EACH + 1)
    assert not sizes(4).of_text


def test_a_payload_larger_than_any_keeps_nobody_waiting_for_room() -> None:
    assert payload_sizes(opened(0, shape=[3, 4]), 48) == {"key0": 48}
    assert payload_sizes(opened(0, shape=[3, 4]), 47) == {"key0": 0}
    assert payload_sizes(opened(0, shape=[2**62, 2**62])) == {"key0": 0}


def test_a_shape_of_very_many_sizes_is_not_multiplied() -> None:
    began = time.process_time()
    assert payload_sizes(opened(0, shape=[2**63] * 300_000)) == {"key0": 0}
    assert time.process_time() - began < 5.0, "it would take minutes"


def test_the_most_urgent_payloads_that_fit_are_fetched_first() -> None:
    backlog = Backlog()
    assert not backlog
    backlog.add("m", [Unfetched(opened(n, 6), 10) for n in range(3)])
    backlog.add("m", [Unfetched(opened(9, 0), 10)])

    def first(room: int, *, alone: bool = False) -> list[int]:
        return [each.opened.slot.index for each in backlog.first("m", room, alone=alone)]

    assert first(25) == [9, 0]
    assert first(5) == []
    assert first(5, alone=True) == [9]
    backlog.drop("m", 2)
    assert first(100) == [1, 2]
    backlog.drop("m", 2)
    assert not backlog


def test_payloads_that_are_not_fetched_take_no_room_from_those_that_are() -> None:
    model = seen(Model(), 1_000, 0)
    budget = Budget([model], 512 * MB)
    assert budget.fetchable("m") == 512 * MB
    claimed(budget, "m", 60, 16 * MB)
    budget.postponed("m", 40 * 16 * MB)
    assert budget.fetchable("m") == 192 * MB
    assert wanted([model], {("m", 0): 100}, budget) == {}
    budget.postponed("m", -11 * 16 * MB)
    assert budget.fetchable("m") == 16 * MB


def test_redis_puts_few_large_payloads_together_at_once() -> None:
    assert [len(keys) for keys in _blocks({str(n): 16 * MB for n in range(5)})] == [2, 2, 1]
    assert [len(keys) for keys in _blocks({str(n): 90 * MB for n in range(2)})] == [1, 1]
    assert [len(keys) for keys in _blocks({str(n): 100 for n in range(100)})] == [64, 36]
    assert list(_blocks({})) == []
