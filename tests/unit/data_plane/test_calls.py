"""Functions that other threads have the data plane's thread run."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from pathlib import Path

import pytest
from helpers.plane import RunningPlane
from helpers.repository import fake_model

from inferq.workers.data_plane.calls import Calls, DataPlaneEnded


class Woken:
    """How often the thread was woken."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def test_functions_run_in_the_order_they_were_put_and_wake_the_thread() -> None:
    woken, ran = Woken(), list[int]()

    def note(n: int) -> int:
        ran.append(n)
        return n

    calls = Calls(woken)
    futures = [calls.put(partial(note, n)) for n in range(3)]
    assert (woken.times, ran) == (3, []), "nothing runs before the thread does it"
    calls.run()
    assert ran == [future.result(0) for future in futures] == [0, 1, 2]


@pytest.mark.parametrize("problem", [ValueError("no"), SystemExit(3)], ids=["error", "exit"])
def test_what_a_function_raises_is_its_callers_and_nobody_elses(problem: BaseException) -> None:
    def fails() -> None:
        raise problem

    calls = Calls(Woken())
    bad, good = calls.put(fails), calls.put(lambda: "done")
    calls.run()
    assert bad.exception(0) is problem
    assert good.result(0) == "done"


def test_what_a_function_puts_waits_for_the_next_turn() -> None:
    calls, ran = Calls(Woken()), list[int]()

    def again() -> None:
        ran.append(1)
        calls.put(again)

    calls.put(again)
    calls.run()
    assert ran == [1]
    calls.run()
    assert ran == [1, 1]


def test_what_was_given_up_in_time_never_runs() -> None:
    calls, ran = Calls(Woken()), list[int]()
    future = calls.put(lambda: ran.append(1))
    with pytest.raises(FutureTimeout):
        future.result(0.01)
    assert future.cancel()
    calls.run()
    assert ran == []


def test_the_end_fails_what_waits_and_what_comes_and_runs_none_of_it() -> None:
    calls, ran = Calls(Woken()), list[int]()
    waits, cancelled = calls.put(lambda: ran.append(1)), calls.put(lambda: ran.append(2))
    cancelled.cancel()
    calls.end()
    comes = calls.put(lambda: ran.append(3))
    for future in (waits, comes):
        with pytest.raises(DataPlaneEnded, match="has ended; the function was not run"):
            future.result(0)
    calls.run()
    assert ran == []


def test_whatever_comes_as_it_ends_is_run_or_fails() -> None:
    for _ in range(50):
        calls, begin = Calls(Woken()), threading.Barrier(2)
        futures: list[Future[bool]] = []

        def put(calls: Calls, begin: threading.Barrier, futures: list[Future[bool]]) -> None:
            begin.wait(10)
            futures += [calls.put(lambda: True) for _ in range(20)]

        thread = threading.Thread(target=put, args=(calls, begin, futures))
        thread.start()
        begin.wait(10)
        calls.run()
        calls.end()
        thread.join(10)
        assert len(futures) == 20
        assert all(each.exception(0) is not None or each.result(0) for each in futures)


@pytest.fixture
def plane(redis_url: str, tmp_path: Path) -> RunningPlane:
    fake_model(tmp_path, "m", knobs="max_batch_size = 8\nwarm_up = false")
    return RunningPlane(redis_url, tmp_path, ["m"])


def test_an_idle_data_plane_runs_a_function_at_once_in_its_own_thread(plane: RunningPlane) -> None:
    with plane:
        name = plane.plane.call(lambda: threading.current_thread().name)
        assert name.result(20) == "inferq-data-plane"
        began = time.monotonic()
        for _ in range(20):  # it would sleep for a second after each
            plane.plane.call(lambda: None).result(20)
        assert time.monotonic() - began < 10


def test_a_function_that_is_called_before_the_start_runs_then(plane: RunningPlane) -> None:
    future = plane.plane.call(lambda: 7)
    assert not future.done()
    with plane:
        assert future.result(20) == 7


def test_a_data_plane_that_has_ended_fails_a_call_at_once(plane: RunningPlane) -> None:
    with plane:
        plane.stop()
        with pytest.raises(DataPlaneEnded):
            plane.plane.call(lambda: None).result(0)


def test_a_call_from_its_own_thread_is_refused_rather_than_waited_for(plane: RunningPlane) -> None:
    with plane:
        future = plane.plane.call(lambda: plane.plane.call(lambda: None).result())
        with pytest.raises(RuntimeError, match="call the function itself"):
            future.result(20)
