"""Celery's own loop is seen to hang, unless it has a reason not to turn."""

from __future__ import annotations

from inferq.workers.control_plane.main_loop import STALL_S, MainLoop


class Time:
    def __init__(self) -> None:
        self.now = 1000.0
        self.excused = False
        self.answering_since = 0.0

    def pass_s(self, seconds: float, loop: MainLoop) -> str | None:
        """What it says at the end, asked every second."""
        said = None
        for _ in range(int(seconds)):
            self.now += 1
            said = loop.problem()
        return said


def watched() -> tuple[Time, MainLoop]:
    time = Time()
    return time, MainLoop(lambda: time.excused, lambda: time.answering_since, lambda: time.now)


def test_one_that_ticks_or_has_not_begun_has_no_problem() -> None:
    time, loop = watched()
    assert time.pass_s(3 * STALL_S, loop) is None
    for _ in range(100):
        loop.tick()
        assert time.pass_s(STALL_S / 2, loop) is None


def test_one_that_ticks_no_more_hangs() -> None:
    time, loop = watched()
    loop.tick()
    assert time.pass_s(STALL_S, loop) is None
    assert time.pass_s(1, loop) == "has not got on for 61 s"
    loop.tick()
    assert loop.problem() is None


def test_an_excuse_counts_from_its_end() -> None:
    time, loop = watched()
    loop.tick()
    time.excused = True
    assert time.pass_s(5 * STALL_S, loop) is None
    time.excused = False
    assert time.pass_s(STALL_S, loop) is None
    assert time.pass_s(2, loop) is not None


def test_it_has_time_to_connect_anew_once_redis_is_back() -> None:
    """Also where nobody asked while Redis was away."""
    time, loop = watched()
    loop.tick()
    time.now += 10 * STALL_S
    time.answering_since = time.now
    assert time.pass_s(STALL_S, loop) is None
    assert time.pass_s(2, loop) is not None
