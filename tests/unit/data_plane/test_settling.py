"""How much of what has ended goes into one MULTI."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.repository import fake_model
from helpers.served import served_model

from inferq.shared.errors import FatalEngineError
from inferq.shared.resp import Command, pack, unpack
from inferq.shared.schema import Ticket
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.rollback import KEEP_BYTES, KEEP_REQUESTS, KEEP_S, SettledMultis
from inferq.workers.claims.runs import Finished, Job, Outcome, Run
from inferq.workers.claims.settlement import Settlement
from inferq.workers.data_plane import settling
from inferq.workers.data_plane.budget import Budget
from inferq.workers.data_plane.counts import Counts
from inferq.workers.data_plane.held import Held
from inferq.workers.data_plane.observers import Observers
from inferq.workers.data_plane.settling import MAX_SETTLEMENTS, Settling, portion

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


def stored(size: int = 1) -> Command:
    return ("SET", "key", b"x" * size)


def test_what_is_kept_is_bounded_in_requests() -> None:
    multis = SettledMultis()
    for n in range(KEEP_REQUESTS // 2 + 10):
        multis.add(pack([("SET", "key", n)]), 2, n)
    found = multis.after(-1)
    assert len(found) == KEEP_REQUESTS // 2
    assert unpack(found[0].storing) == [(b"SET", b"key", b"10")]


def test_what_is_kept_is_bounded_in_bytes() -> None:
    multis = SettledMultis()
    for _ in range(3):
        multis.add(pack([stored(KEEP_BYTES // 2 - 100)]), 1, 1)
    assert len(multis.after(0)) == 2
    multis.add(pack([stored(KEEP_BYTES + 1)]), 1, 1)
    assert multis.after(0) == []


def test_only_what_redis_does_not_know_is_settled_again() -> None:
    multis = SettledMultis()
    for n in range(5):
        multis.add(pack([("SET", "key", n)]), 1, n)
    assert [one.number for one in multis.after(2)] == [3, 4]
    assert multis.last == 4


def test_what_was_settled_again_is_kept_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    multis = SettledMultis()
    for n in range(3):
        multis.add(pack([stored()]), 1, n)
    now = time.monotonic() + KEEP_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for multi in multis.after(0):
        multis.again(multi)
    multis.trim()
    assert [one.number for one in multis.after(-1)] == [1, 2]


def test_an_engine_that_an_audit_found_beyond_use_is_told_and_its_batch_counts_once(
    tmp_path: Path,
) -> None:
    fake_model(tmp_path, "m", knobs="max_batch_size = 4\nwarm_up = false")
    model = served_model(tmp_path, "m")
    item = Waiting(
        ticket=Ticket("id", "m", ""),
        inputs={},
        slot=Slot(CLAIM, 0),
        compatible=None,
        arrived_mono_ms=0.0,
        claimed_redis_ms=0.0,
        rows=1,
        alone=False,
    )
    job = Job([item], {0: 1})
    model.jobs.append(job)
    observers = Observers([Counts({"m": model.counts})])
    held = Held({"m": model}, Budget([model], 1 << 30))
    of = Settling({"m": model}, held, cast("Any", None), observers)
    run = Run(1000.0, 2000.0, 1, 0, 1)
    of.on_finished(Finished(job, (Outcome(item, {}, run),), began=1.0, ended=2.0))
    assert of.collect() is None
    fatal = FatalEngineError("sticky")
    of.on_finished(Finished(job, (), fatal=fatal, audited=True))
    assert of.collect() is fatal
    assert (of.batches_ended, model.counts.batches, model.counts.busy_s) == (1, 1, 1.0)
    assert of.ending() == 1, "its request is settled all the same"
    model.close(10)
