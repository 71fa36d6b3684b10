"""Observers are told in turn, and none of them keeps news from the others."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import pytest

from inferq.workers.batching.waiting import Waiting
from inferq.workers.data_plane import observers
from inferq.workers.data_plane.observers import Observer, Observers, Settled

SETTLED = Settled([], frozenset(), 1.0, 2.0)


class Notes(Observer):
    """Takes note of two kinds of news."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def claimed(self, items: Sequence[Waiting]) -> None:
        self.seen.append(items)

    def settled(self, settled: Settled) -> None:
        self.seen.append(settled)


class Raises(Observer):
    def claimed(self, items: Sequence[Waiting]) -> None:
        raise ValueError("a fault of its own")

    def settled(self, settled: Settled) -> None:
        raise KeyError("another")


def test_one_that_raises_keeps_no_news_from_those_behind_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notes = Notes()
    told = Observers([Raises(), notes])
    told.claimed([])
    told.settled(SETTLED)
    assert notes.seen == [[], SETTLED]
    assert [record.getMessage() for record in caplog.records] == [
        "Raises.claimed raised; requests are served all the same",
        "Raises.settled raised; requests are served all the same",
    ]
    assert all(record.exc_info for record in caplog.records), "with the traceback"


def test_what_is_raised_again_and_again_is_said_now_and_then_with_how_often(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Observers([Raises()])
    for _ in range(1_000):
        told.claimed([])
    assert len(caplog.records) == 1
    later = time.monotonic() + 3600
    monkeypatch.setattr(told._sayings, "_clock", lambda: later)
    told.claimed([])
    assert "(and 999 more like it before)" in caplog.records[1].getMessage()


def test_a_log_that_cannot_be_written_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(observers.logger, "error", broken)
    notes = Notes()
    Observers([Raises(), notes]).claimed([])
    assert notes.seen == [[]]


def test_news_that_nobody_wants_calls_nobody() -> None:
    """What is not overridden is not even looked at: it costs a request nothing."""
    told = Observers([Notes(), Observer()])
    calls: list[str] = []

    def note(frame: object, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)  # type: ignore[attr-defined]

    sys.setprofile(note)
    try:
        told.refused([])
    finally:
        sys.setprofile(None)
    assert calls == ["Observers.refused", "Observers._tell"]
