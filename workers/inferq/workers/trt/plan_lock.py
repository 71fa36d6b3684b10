"""One process at a time builds a plan; the others wait, say for whom, and do not wait for ever.

The lock is the kernel's (`flock`): it ends with the process that has it. The file says who that is,
as JSON: ``{"pid": 4242, "host": "video1"}``.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.trt.phases import Progress, phase, stop_if_asked

logger = logging.getLogger(__name__)

#: The longest wait for a build of another process that is alive: such builds take minutes.
LOCK_WAIT_S: Final = 1800.0
#: How often the log says that it still waits.
TOLD_EVERY_S: Final = 30.0
#: Between two looks at the lock: at first, and later on.
_FIRST_PAUSE_S, _PAUSE_S = 0.02, 0.5
_MAX_HOLDER_BYTES: Final = 1024


class StillLocked(ConfigError):
    """Another process has had the lock for all the time that it was waited for."""


class Holder(msgspec.Struct, frozen=True):
    """Who has a lock."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def locked(
    path: Path, *, wait_s: float = LOCK_WAIT_S, progress: Progress | None = None
) -> Iterator[bool]:
    """Hold the lock in the file `path`, waiting for it no longer than `wait_s`.

    Gives False, and takes no lock, where the file cannot be written. Raises StillLocked, naming who
    has it; BuildStopped while it waits; ConfigError: there can be no lock.
    """
    file = _acquire(path, time.monotonic() + wait_s, wait_s, progress)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            os.ftruncate(file, 0)
        os.close(file)


def _acquire(path: Path, deadline: float, wait_s: float, progress: Progress | None) -> int | None:
    while True:
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            if problem.errno in {errno.EROFS, errno.EACCES}:
                return None
            raise ConfigError(f"{path} cannot be written: {problem.strerror}") from problem
        try:
            _wait(file, path, deadline, wait_s, progress)
            if _is(file, path):
                _sign(file)
                return file
        except BaseException:
            os.close(file)
            raise
        # It was deleted meanwhile: others lock the new one.
        os.close(file)


def _wait(file: int, path: Path, deadline: float, wait_s: float, progress: Progress | None) -> None:
    pause, told = _FIRST_PAUSE_S, 0.0
    with ExitStack() as shown:
        while not _try(file, path):
            now = time.monotonic()
            holder = _holder(file)
            if now >= deadline:
                raise StillLocked(
                    f"{holder} has locked {path} for {wait_s:g} s and builds that plan; expected "
                    "it to end: wait for it, or end it"
                )
            if not told:
                name = f"Waiting for {holder}, which builds the same plan"
                shown.enter_context(phase(progress, name))
            if not told or now - told >= TOLD_EVERY_S:
                told = now
                logger.info(
                    "waiting for %s, which builds the same plan (%s), for at most %.0f s",
                    holder,
                    path.stem,
                    deadline - now,
                )
            stop_if_asked(progress)
            time.sleep(min(pause, max(0.0, deadline - now)))
            pause = min(pause * 1.5, _PAUSE_S)


def _try(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        raise ConfigError(f"{path} cannot be locked: {problem.strerror}") from problem
    return True


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sign(file: int) -> None:
    """Say whose lock it is. A full disk keeps that to itself: plans can be found all the same."""
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, msgspec.json.encode(Holder(os.getpid(), socket.gethostname())), 0)


def _holder(file: int) -> Holder | str:
    try:
        return msgspec.json.decode(os.pread(file, _MAX_HOLDER_BYTES, 0), type=Holder)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return "another process"
