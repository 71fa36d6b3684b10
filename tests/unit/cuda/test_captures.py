"""One lane captures at a time, and nothing that would spoil it goes on meanwhile."""

from __future__ import annotations

import gc
import threading

import pytest
from helpers.wait import until

from inferq.workers.cuda.captures import CaptureLock, no_garbage_collection


def _waits(lock: CaptureLock) -> bool:
    return bool(lock._changed._waiters)  # type: ignore[attr-defined]


def test_others_wait_for_a_capture_and_not_for_each_other() -> None:
    lock, done = CaptureLock(), threading.Event()

    def other() -> None:
        with lock.shared():
            done.set()

    with lock.shared(), lock.shared():
        pass
    thread = threading.Thread(target=other)
    with lock.exclusive(1.0) as mine:
        assert mine
        thread.start()
        until(lambda: _waits(lock))
        assert not done.is_set()
    thread.join(10)
    assert done.is_set()


def test_a_capture_waits_for_what_others_are_at() -> None:
    lock, captured = CaptureLock(), threading.Event()

    def capture() -> None:
        with lock.exclusive(10.0) as mine:
            if mine:
                captured.set()

    thread = threading.Thread(target=capture)
    with lock.shared():
        thread.start()
        until(lambda: _waits(lock))
        with lock.shared():  # others may begin all the same
            assert not captured.is_set()
    thread.join(10)
    assert captured.is_set()


def test_a_capture_that_cannot_be_alone_in_time_is_not_made() -> None:
    lock = CaptureLock()
    with lock.shared(), lock.exclusive(0.01) as mine:
        assert not mine
    with lock.exclusive(0.01) as mine, lock.exclusive(0.01) as second:
        assert mine
        assert not second
    with lock.exclusive(0.01) as mine:
        assert mine, "neither holds it any more"


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_whoever_raises_lets_go(kind: str) -> None:
    lock = CaptureLock()
    held = lock.shared() if kind == "shared" else lock.exclusive(1.0)
    with pytest.raises(ZeroDivisionError), held:
        raise ZeroDivisionError
    with lock.exclusive(0.01) as mine:
        assert mine


def test_garbage_is_collected_again_after_a_capture() -> None:
    assert gc.isenabled()
    with no_garbage_collection():
        assert not gc.isenabled()
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
