"""What observers are told of requests that a data plane serves, and that they cannot harm it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis as redis_py
from helpers.plane import RunningPlane
from helpers.repository import fake_model, message, numbered
from helpers.results import nothing_is_held
from helpers.wait import until

from inferq.producer import Client
from inferq.shared.errors import InferqError
from inferq.shared.names import Names
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Finished
from inferq.workers.claims.verdicts import Failed, Revoked
from inferq.workers.data_plane.observers import Observer, Settled
from inferq.workers.engines.fake import FAULT_RAISE


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path, "m", knobs="max_batch_size = 8\nwarm_up = false", fake="faults = true")
    return tmp_path


class Notes(Observer):
    """Each news: its kind, the requests that it is about, the thread that told it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str], str]] = []

    def _note(self, kind: str, ids: Sequence[str]) -> None:
        self.seen.append((kind, list(ids), threading.current_thread().name))

    def claimed(self, items: Sequence[Waiting]) -> None:
        self._note("claimed", [item.ticket.id for item in items])

    def refused(self, ended: Sequence[Failed | Revoked]) -> None:
        self._note("refused", [each.ticket.id for each in ended])

    def started(self, items: Sequence[Waiting]) -> None:
        self._note("started", [item.ticket.id for item in items])

    def finished(self, finished: Finished) -> None:
        self._note("finished", [item.ticket.id for item in finished.job.items])

    def settled(self, settled: Settled) -> None:
        self._note("settled", [str(done.request_id) for done in settled.settlements])

    def about(self, request_id: str) -> list[str]:
        return [kind for kind, ids, _ in self.seen if request_id in ids]


class Raises(Notes):
    def _note(self, kind: str, ids: Sequence[str]) -> None:
        super()._note(kind, ids)
        raise RuntimeError(kind)


def test_an_observer_is_told_of_each_request_once_and_in_order(
    redis_url: str, redis: redis_py.Redis, models: Path
) -> None:
    notes = Notes()
    sent = dict(message("m", numbered(n)) for n in range(20))
    failing, raw = message("m", numbered(FAULT_RAISE))
    wrong, other = message("m", numbered(1, width=5))
    late, third = message("m", numbered(1), deadline_ms=1.0)
    redis.lpush(Names().queue("m"), *sent.values(), raw, other, third)
    with RunningPlane(redis_url, models, ["m"], [notes]):
        until(lambda: sum(len(ids) for kind, ids, _ in notes.seen if kind == "settled") == 23)
    computed = ["claimed", "started", "finished", "settled"]
    assert {tuple(notes.about(one)) for one in (*sent, failing)} == {tuple(computed)}
    assert notes.about(wrong) == notes.about(late) == ["refused", "settled"]
    threads = {kind: {name for each, _, name in notes.seen if each == kind} for kind in computed}
    assert threads.pop("started") == {"inferq-m-0"}
    assert set().union(*threads.values()) == {"inferq-data-plane"}


def test_an_observer_is_told_of_batches_and_not_of_single_requests(
    redis_url: str, redis: redis_py.Redis, models: Path
) -> None:
    notes = Notes()
    redis.lpush(Names().queue("m"), *(message("m", numbered(n))[1] for n in range(80)))
    with RunningPlane(redis_url, models, ["m"], [notes]) as running:
        until(lambda: running.plane.settled == 80, what="all are settled")
        counted = [
            sum(each == kind for each, _, _ in notes.seen) for kind in ("started", "finished")
        ]
        batches = running.models["m"].counts.batches
    assert counted == [batches, batches]
    assert batches < 40, "80 requests wait, and a batch holds 8"


def test_requests_are_served_though_an_observer_raises_at_all_it_is_told(
    redis_url: str, redis: redis_py.Redis, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raises, notes = Raises(), Notes()
    with RunningPlane(redis_url, models, ["m"], [raises, notes]) as running:
        with Client(redis_url) as client:
            for n in range(30):
                assert client.infer("m", {"x": numbered(n)}, timeout=20).outputs["x"][0, 0] == n
            with pytest.raises(InferqError):
                client.infer("m", {"x": numbered(FAULT_RAISE)}, timeout=20)
        redis.lpush(Names().queue("m"), message("m", numbered(1, width=5))[1])
        until(lambda: running.plane.settled == 32, what="all are settled")
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert not running.control.ended
    kinds = {"claimed", "refused", "started", "finished", "settled"}
    assert {kind for kind, _, _ in raises.seen} == kinds
    assert notes.seen == raises.seen, "the one behind it is told all the same"
    said = [each for each in caplog.records if each.name.endswith("data_plane.observers")]
    assert len(said) == len(kinds)
    assert {each.levelno for each in said} == {logging.ERROR}
