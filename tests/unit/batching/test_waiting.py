"""Waiting requests stand in order of urgency, then arrival, and leave as the policy decided."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferq.shared.schema import Ticket
from inferq.workers.batching.policy import Leave
from inferq.workers.batching.waiting import Waiting, WaitingRequests


def item(name: str, priority: int = 0, rows: int = 1) -> Waiting:
    return Waiting(
        ticket=Ticket(name, "m", "", priority=priority),
        inputs={},
        slot=None,
        compatible=None,
        arrived_mono_ms=0.0,
        claimed_redis_ms=0.0,
        rows=rows,
        alone=False,
    )


def waiting(*items: Waiting) -> WaitingRequests:
    requests = WaitingRequests()
    for each in items:
        requests.add(each)
    return requests


def ids(requests: WaitingRequests) -> str:
    return "".join(item.ticket.id for item in requests.items)


def test_more_urgent_requests_stand_before_and_equals_in_the_order_they_came() -> None:
    requests = waiting(item("a", 3), item("b", 9), item("c", 0), item("d", 3), item("e", 0))
    assert ids(requests) == "ceadb"


@given(st.lists(st.sampled_from([0, 3, 6, 9])))
def test_any_order_of_arrival_gives_that_order(priorities: list[int]) -> None:
    requests = waiting(*(item(str(n), priority) for n, priority in enumerate(priorities)))
    got = [(i.ticket.priority, int(i.ticket.id)) for i in requests.items]
    assert got == sorted(got)
    assert len(requests) == len(priorities)


def test_rows_are_counted_by_priority_as_requests_come_and_go() -> None:
    requests = waiting(item("a", 0, 2), item("b", 3, 3), item("c", 9, 5), item("d", 3, 1))
    assert requests.rows == {0: 2, 3: 4, 9: 5}
    requests.take(Leave((0, 2), 3, 3))
    assert requests.rows == {0: 0, 3: 3, 9: 5}


def test_those_taken_are_gone_and_the_others_keep_their_order() -> None:
    requests = waiting(*map(item, "abcdef"))
    assert [i.ticket.id for i in requests.take(Leave((0, 1), 2, 2))] == ["a", "b"]
    assert ids(requests) == "cdef"
    assert [i.ticket.id for i in requests.take(Leave((1, 3), 2, 2))] == ["d", "f"]
    assert ids(requests) == "ce"


def test_those_that_were_overtaken_remember_how_often() -> None:
    requests = waiting(*map(item, "abcdef"))
    b, c = requests.items[1], requests.items[2]
    requests.take(Leave((0, 3), 2, 2, {1: 1, 2: 1}))
    requests.take(Leave((2,), 1, 1, {1: 1}))
    assert (b.overtaken, c.overtaken) == (1, 2)
    assert ids(requests) == "bcf"


def test_clear_leaves_nothing() -> None:
    requests = waiting(*map(item, "abc"))
    requests.clear()
    assert len(requests) == 0
    assert not any(requests.rows.values())
