"""How much of what has ended goes into one MULTI."""

from __future__ import annotations

import pytest

from inferq.workers import settling
from inferq.workers.claims import Claim, Slot
from inferq.workers.kept import KEEP_BYTES, KEEP_RESULTS, Kept
from inferq.workers.settle import Settlement
from inferq.workers.settling import MAX_SETTLEMENTS, portion

CLAIM = Claim("k", "m", 0, 100)


def settlement(place: int, outcome: int = 10, **given: object) -> Settlement:
    return Settlement(Slot(CLAIM, place), "m", f"id{place}", b"x" * outcome, **given)  # type: ignore[arg-type]


def test_a_portion_is_bounded_in_number() -> None:
    many = [settlement(n) for n in range(MAX_SETTLEMENTS + 5)]
    assert portion(many) == many[:MAX_SETTLEMENTS]


@pytest.mark.parametrize(
    "large",
    [
        {"outcome": 600},
        {"dead_letter": b"x" * 300},
        {"before": (("RPUSH", "key", b"x" * 600),)},
    ],
    ids=["result", "dead letter, sent twice", "what is kept for later"],
)
def test_a_portion_is_bounded_in_bytes_and_never_empty(
    monkeypatch: pytest.MonkeyPatch, large: dict[str, object]
) -> None:
    monkeypatch.setattr(settling, "MAX_SETTLE_BYTES", 1_000)
    many = [settlement(n, **large) for n in range(3)]  # type: ignore[arg-type]
    assert len(portion(many)) == 1
    monkeypatch.setattr(settling, "MAX_SETTLE_BYTES", 10)
    assert len(portion(many)) == 1
    assert portion([]) == []


def test_what_is_kept_is_bounded_in_number() -> None:
    kept = Kept()
    for n in range(KEEP_RESULTS + 10):
        kept.add([settlement(n)], n)
    found = kept.after(-1)
    assert len(found) == KEEP_RESULTS
    assert found[0].request_id == "id10"


def test_what_is_kept_is_bounded_in_bytes() -> None:
    kept = Kept()
    half = [settlement(0, KEEP_BYTES // 2)]
    for _ in range(3):
        kept.add(half, 1)
    assert len(kept.after(0)) == 2
    kept.add([settlement(0, KEEP_BYTES + 1)], 1)
    assert kept.after(0) == []


def test_only_what_redis_does_not_know_is_settled_again() -> None:
    kept = Kept()
    for n in range(5):
        kept.add([settlement(n)], n)
    assert [done.request_id for done in kept.after(2)] == ["id3", "id4"]
