"""A background loop survives whatever its turns raise, says so, and is seen if it does not."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
import redis
from helpers.wait import until

from inferq.workers.process.periodic import (
    MAX_KINDS,
    MAX_SAY_AGAIN_S,
    SAY_AGAIN_S,
    Periodic,
    Sayings,
)
from inferq.workers.process.periodic import troubles as troubles_of

logger = logging.getLogger("inferq.test_periodic")
#: Far above what a turn takes, far below the waits that are cut short.
AT_ONCE_S, LONG_S = 5.0, 60.0

Make = Callable[..., Periodic]


@pytest.fixture
def make() -> Iterator[Make]:
    """Loops that are stopped at the end."""
    made: list[Periodic] = []

    def make(turn: Callable[[], float | None], **given: object) -> Periodic:
        options = {"every_s": 0.001, "failing": "it fails", "logger": logger, **given}
        made.append(Periodic("test", turn, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.stop()


class Turns:
    """Counts turns, and raises in each of them what it was given, one after another."""

    def __init__(self, *raises: BaseException | None) -> None:
        self._raises = list(raises)
        self.at: list[float] = []

    def __call__(self) -> None:
        self.at.append(time.monotonic())
        if self._raises and (problem := self._raises.pop(0)) is not None:
            raise problem

    @property
    def count(self) -> int:
        return len(self.at)

    def reached(self, count: int) -> bool:
        return self.count == count


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("odd"),
        KeyError("k"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        redis.ResponseError("WRONGTYPE"),
        OSError("gone"),
        MemoryError(),
        RecursionError(),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_a_loop_goes_on_after_whatever_a_turn_raises(
    make: Make, problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    turns = Turns(problem)
    loop = make(turns, retry_s=0.001)
    loop.start()
    until(lambda: turns.count >= 3, what="it goes on")
    assert loop.problem() is None
    (line,) = [record for record in caplog.records if "it fails" in record.getMessage()]
    foreseen = isinstance(problem, redis.RedisError | OSError)
    assert line.levelno == (logging.WARNING if foreseen else logging.ERROR)
    assert bool(line.exc_info) is not foreseen, "what nobody foresaw has its traceback"


def test_a_turn_that_keeps_failing_is_repeated_more_and_more_slowly(make: Make) -> None:
    turns = Turns(*[ValueError(str(n)) for n in range(6)])
    loop = make(turns, retry_s=0.05, max_retry_s=0.4)
    loop.start()
    until(lambda: turns.count >= 7, what="seven turns")
    waits = [after - before for before, after in pairwise(turns.at[:7])]
    for wait, expected in zip(waits, (0.05, 0.1, 0.2, 0.4, 0.4, 0.4), strict=True):
        assert wait >= expected * 0.9


def test_where_redis_is_away_it_is_tried_again_at_the_same_pace(make: Make) -> None:
    """However long it was away: work is to go on at once when it is back."""
    turns = Turns(*[redis.ConnectionError("away")] * 20)
    loop = make(turns, retry_s=0.02, max_retry_s=LONG_S)
    loop.start()
    until(lambda: turns.count >= 21, AT_ONCE_S, "it did not back off")


def test_a_wake_up_cuts_every_wait_short(make: Make) -> None:
    turns = Turns()
    loop = make(turns, every_s=LONG_S, first_s=LONG_S)
    loop.start()
    for count in (1, 2):
        loop.wake()
        until(partial(turns.reached, count), AT_ONCE_S, "a turn")


def test_a_turn_says_when_the_next_one_is_due(make: Make) -> None:
    pauses = [0.01, LONG_S]
    at: list[float] = []

    def turn() -> float:
        at.append(time.monotonic())
        return pauses[min(len(at), 2) - 1]

    loop = make(turn, every_s=LONG_S)
    loop.start()
    until(lambda: len(at) == 2, AT_ONCE_S, "the second turn")
    assert not loop._wake.wait(0.1)
    assert len(at) == 2


def test_stopping_waits_for_the_turn_and_runs_the_ending_once(make: Make) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def turn() -> None:
        begun.set()
        go_on.wait(LONG_S)

    loop = make(turn, ending=lambda: ended.append(threading.current_thread().name))
    loop.start()
    assert begun.wait(AT_ONCE_S)
    assert not loop.stop(0.01)
    go_on.set()
    assert loop.stop()
    assert loop.stop()
    assert ended == ["inferq-test"]
    assert loop.problem() is None, "one that was told to end has no problem"


def test_a_loop_that_was_never_started_has_no_problem_and_stops(make: Make) -> None:
    loop = make(Turns())
    assert loop.problem() is None
    assert loop.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_ends_all_the_same_is_told(make: Make) -> None:
    loop = make(Turns(SystemExit()))
    loop.start()
    until(loop.problem, what="it is seen")
    assert troubles_of([loop]) == {"test": "has ended"}


def test_a_turn_that_hangs_is_told_until_it_goes_on(make: Make) -> None:
    go_on = threading.Event()
    loop = make(lambda: go_on.wait(LONG_S) and None, stall_s=0.05)
    patient = make(lambda: go_on.wait(LONG_S) and None, stall_s=math.inf)
    for each in (loop, patient):
        each.start()
    until(loop.problem, what="it is seen")
    assert str(loop.problem()).startswith("has not got on for")
    assert patient.problem() is None
    go_on.set()
    until(lambda: loop.problem() is None, what="all is well")


def test_what_keeps_failing_is_said_less_and_less_often() -> None:
    now = [0.0]
    sayings = Sayings(lambda: now[0])
    said: list[tuple[float, int]] = []
    while now[0] < 2 * MAX_SAY_AGAIN_S:
        if (unsaid := sayings.due("kind")) is not None:
            said.append((now[0], unsaid))
        now[0] += 1.0
    times = [at for at, _ in said]
    assert times[:4] == [0.0, SAY_AGAIN_S, 3 * SAY_AGAIN_S, 7 * SAY_AGAIN_S]
    assert max(after - before for before, after in pairwise(times)) <= MAX_SAY_AGAIN_S
    assert [unsaid for _, unsaid in said[:3]] == [0, SAY_AGAIN_S - 1, 2 * SAY_AGAIN_S - 1]
    assert sayings.due("another kind") == 0, "kinds are told apart"
    now[0] += 3 * MAX_SAY_AGAIN_S
    assert sayings.due("kind") is not None
    now[0] += SAY_AGAIN_S
    assert sayings.due("kind") == 0, "after a long quiet time it is said as at first"


def test_the_kinds_that_are_remembered_are_bounded() -> None:
    sayings = Sayings()
    for n in range(10 * MAX_KINDS):
        assert sayings.due(str(n)) == 0
    assert len(sayings._said) == MAX_KINDS
