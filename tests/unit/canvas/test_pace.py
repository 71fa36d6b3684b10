"""A thread that makes many links lets other threads run."""

from __future__ import annotations

import pytest

from inferq.workers.canvas import pace
from inferq.workers.canvas.pace import BREAK_S, WORK_S, Pace


class Clock:
    """CPU seconds of the thread, and the breaks that it took."""

    def __init__(self) -> None:
        self.worked = 7.0
        self.breaks: list[float] = []

    def thread_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.breaks.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def test_a_thread_takes_a_break_once_for_each_stretch_of_work(clock: Clock) -> None:
    made = Pace()
    made.begin()
    for _ in range(10):
        clock.worked += WORK_S * 0.6
        made.give_way()
    assert clock.breaks == [BREAK_S] * 5


def test_a_request_with_few_links_takes_no_break_whatever_was_done_before(clock: Clock) -> None:
    made = Pace()
    for _ in range(10):
        made.begin()
        clock.worked += WORK_S * 0.9
        made.give_way()
    assert clock.breaks == []
