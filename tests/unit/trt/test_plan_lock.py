"""A plan's lock is waited for in sight, and not for ever."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.wait import until

from inferq.shared.errors import ConfigError
from inferq.workers.commands.build_progress import Steps
from inferq.workers.trt import plan_lock
from inferq.workers.trt.phases import BuildStopped
from inferq.workers.trt.plan_lock import StillLocked, locked

#: Has the lock until its input ends.
_HOLDER = """
import sys
from pathlib import Path
from inferq.workers.trt.plan_lock import locked
with locked(Path(sys.argv[1])) as taken:
    print(taken, flush=True)
    sys.stdin.read()
"""


class Shown(Steps):
    """Notes what is under way."""

    def __init__(self) -> None:
        super().__init__(2)
        self.seen: list[str] = []

    def began(self, phase: str, depth: int, steps: int) -> None:
        self.seen.append(phase)

    def ended(self, phase: str) -> None:
        self.seen.append(f"end of {phase}")


@contextmanager
def _held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "True\n"
            yield child
        finally:
            child.kill()


def test_who_waits_says_for_whom_and_gives_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(plan_lock, "TOLD_EVERY_S", 0.1)
    path = tmp_path / "a.lock"
    with _held(path) as child:
        holder = f"process {child.pid} on {socket.gethostname()}"
        shown = Shown()
        with (
            pytest.raises(StillLocked, match=f"^{holder} has locked {path} for 0.5 s .*; expected"),
            locked(path, wait_s=0.5, progress=shown),
        ):
            pytest.fail("two have it")
        name = f"Waiting for {holder}, which builds the same plan"
        assert shown.seen == [name, f"end of {name}"]
        told = [each for each in caplog.messages if each.startswith(f"waiting for {holder}, ")]
        assert len(told) >= 2, "at once, and every so often"


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with _held(path) as child:
        child.kill()
        child.wait()
        with locked(path, wait_s=10) as taken:
            assert taken
            assert f'"pid":{os.getpid()}' in path.read_text()
    assert path.read_text() == "", "nobody has it"


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    shown = Shown()
    got = threading.Event()

    def wait() -> None:
        with locked(path, progress=shown) as taken:
            assert taken
            got.set()

    with _held(path) as child:
        waiting = threading.Thread(target=wait)
        waiting.start()
        until(lambda: shown.seen, what="it waits")
        assert not got.is_set()
        assert child.stdin is not None
        child.stdin.close()
        assert got.wait(30)
        waiting.join(30)


def test_ctrl_c_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    shown = Shown()
    with _held(path):
        stop = threading.Thread(target=lambda: _stop(shown))
        stop.start()
        with pytest.raises(BuildStopped), locked(path, wait_s=60, progress=shown):
            pytest.fail("two have it")
        stop.join(30)


def _stop(shown: Shown) -> None:
    until(lambda: shown.seen, what="it waits")
    shown.stopped = True


def test_a_lock_file_that_was_deleted_meanwhile_locks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    shown = Shown()
    with _held(path) as first:
        taken = threading.Thread(target=lambda: _take(path, shown))
        taken.start()
        until(lambda: shown.seen, what="it waits")
        path.unlink()
        with _held(path) as second:
            first.kill()
            until(lambda: any(f"process {second.pid}" in each for each in shown.seen))
        taken.join(30)
        assert not taken.is_alive()


def _take(path: Path, shown: Shown) -> None:
    with locked(path, wait_s=60, progress=shown) as taken:
        assert taken


@pytest.mark.parametrize("content", [b"", b"junk", b"{}", b"\xff", b'{"pid":"x","host":1}'])
def test_a_lock_of_which_nobody_tells_who_has_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.lock"
    path.write_bytes(content)
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(StillLocked, match=r"^another process has locked"),
            locked(path, wait_s=0),
        ):
            pytest.fail("two have it")


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("inferq.workers.trt.plan_lock.fcntl.flock", none)
    with (
        pytest.raises(ConfigError, match=r"a\.lock cannot be locked: No locks available"),
        locked(tmp_path / "a.lock"),
    ):
        pytest.fail("it is locked")
