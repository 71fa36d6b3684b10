"""What one message may revoke, and how much all of them together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery.worker import state as worker_state

from inferq.workers.control_plane.revokes import (
    MAX_REVOKED,
    REVOKED_PER_S,
    Revokes,
    TooMany,
    newest,
)


@pytest.fixture(autouse=True)
def none_revoked() -> Iterator[None]:
    worker_state.revoked.clear()
    yield
    worker_state.revoked.clear()


def test_one_id_or_a_list_of_them_is_revoked() -> None:
    revokes = Revokes()
    assert revokes.add("one") == ["one"]
    assert revokes.add(["two", "three", "two"]) == ["three", "two"]
    assert revokes.add(None) == revokes.add([]) == []
    assert set(worker_state.revoked) == {"one", "two", "three"}
    assert newest()[0] == "one"


@pytest.mark.parametrize("odd", [5, {"a": 1}, [5], [None], [[]], ["x" * 1_001], True, 1.5])
def test_what_is_no_id_revokes_nothing(odd: object) -> None:
    with pytest.raises(TypeError, match="expected"):
        Revokes().add(odd)
    assert not worker_state.revoked


def test_too_many_ids_in_one_message_are_refused() -> None:
    with pytest.raises(TooMany, match=f"at most {MAX_REVOKED}"):
        Revokes().add([str(n) for n in range(MAX_REVOKED + 1)])
    assert not worker_state.revoked


def test_message_after_message_may_add_so_many_a_second() -> None:
    now = 0.0
    revokes = Revokes(lambda: now)
    sent = 0

    def send() -> None:
        nonlocal sent
        sent += 1
        revokes.add([f"{sent} {n}" for n in range(MAX_REVOKED)])

    for _ in range(worker_state.REVOKES_MAX // MAX_REVOKED):
        send()
    with pytest.raises(TooMany, match="a second"):
        send()
    now += MAX_REVOKED / REVOKED_PER_S
    send()
    with pytest.raises(TooMany, match="a second"):
        send()
    assert len(worker_state.revoked) <= worker_state.REVOKES_MAX
    assert len(newest()) == MAX_REVOKED
