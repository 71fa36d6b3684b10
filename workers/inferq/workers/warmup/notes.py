"""Notes which size a process tries for the first time, in a file that outlives the process.

SIGKILL leaves no time to write. So before a batch runs that is larger than any before it, one write
notes it, and another one afterwards that the process survived it. A live process holds a lock on
its note: a note without a lock belongs to a dead process. A process that is told to end deletes its
note.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from inferq.workers.process.own_files import read_own
from inferq.workers.process.user_cache import user_cache
from inferq.workers.warmup import limits
from inferq.workers.warmup.cache import MAX_BYTES, Cache, Killed, Record

logger = logging.getLogger(__name__)

#: A note is one write of so many bytes: a process that dies meanwhile has written all of it or
#: nothing.
NOTE_BYTES: Final = 4096
#: Seconds for which an unexplained end counts against a size.
UNSURE_S: Final = 600.0
#: Two such ends at one size within so many seconds are no coincidence.
AGAIN_S: Final = 86_400.0
#: Memory limits that differ by a smaller share count as the same.
_SAME: Final = 0.02


class Size(msgspec.Struct, frozen=True):
    """Elements of a batch's inputs, and its rows."""

    elements: int
    rows: int


class Note(msgspec.Struct, frozen=True):
    """A live process' note about one model."""

    pid: int
    #: Unix s.
    at: float
    boot: str
    #: The memory that was allowed, in bytes.
    allowed: int
    #: The size that runs for the first time; None: none does.
    trying: Size | None
    #: The largest size that it has survived.
    survived: Size | None
    #: Whether requests are served: then even `survived` may be too large.
    serving: bool
    #: The result of `limits.oom_kills` at that time.
    oom_kills: dict[str, int]


class Notes:
    """One model's note in this process, and those that earlier processes left. For any thread."""

    def __init__(self, cache: Cache, stem: str, allowed: int) -> None:
        self._cache = cache
        self._stem = stem
        #: The memory that is allowed, in bytes.
        self._allowed = allowed
        self._lock = threading.Lock()
        self._file: int | None = None
        self._path: Path | None = None
        self._trying: list[Size] = []
        self._serving = False
        #: The most elements that this process has survived.
        self.survived = 0
        self._survived: Size | None = None
        self.record = Record()

    def open(self) -> Killed | None:
        """Judge the notes that earlier processes left, and begin this one's.

        Returns the smallest size that must not be tried.
        """
        self.record = self._cache.read(self._stem)
        folder = self._cache.folder
        if folder is None:
            return None
        found = False
        for path in sorted(folder.glob(f"{self._stem}.*.trying")):
            for killed in _left(path):
                found = True
                self._remember(killed)
        heeded = [killed for killed in self.record.killed if self._holds(killed)]
        if found or any(not killed.heeded for killed in self.record.killed):
            self.record.killed = [
                msgspec.structs.replace(killed, heeded=True) for killed in self.record.killed
            ]
            self.save()
        self._begin(folder)
        return min(heeded, key=lambda killed: killed.elements, default=None)

    def _remember(self, killed: Killed) -> None:
        again = any(
            old.elements == killed.elements and time.time() - old.at < AGAIN_S
            for old in self.record.killed
        )
        kept = [old for old in self.record.killed if old.elements != killed.elements]
        sure = killed.sure or again
        self.record.killed = [*kept, msgspec.structs.replace(killed, sure=sure)]

    def _holds(self, killed: Killed) -> bool:
        """Whether this start must stay below that size."""
        age = time.time() - killed.at
        same = abs(killed.allowed - self._allowed) <= _SAME * max(killed.allowed, self._allowed)
        return same and (killed.sure or (not killed.heeded and age < UNSURE_S))

    def _begin(self, folder: Path) -> None:
        name = f"{self._stem}.{secrets.token_hex(4)}"
        new, path = folder / f".{name}", folder / f"{name}.trying"
        file = None
        try:
            file = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            # Locked before it gets its name, so that nobody takes it for a dead process' note.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file, self._path = file, path
            self._write()
            new.rename(path)
        except OSError as problem:
            logger.info("%s: sizes that are tried are not noted (%s)", path, problem.strerror)
            self._file = self._path = None
            if file is not None:
                os.close(file)
            with suppress(OSError):
                new.unlink()

    @contextmanager
    def trying(self, size: Size) -> Iterator[None]:
        """A context in which batches of `size` run, which is larger than all that were survived."""
        with self._lock:
            self._trying.append(size)
            self._write()
        try:
            yield
        finally:
            with self._lock:
                self._trying.remove(size)
                if size.elements > self.survived:
                    self.survived, self._survived = size.elements, size
                self._write()

    def serve(self) -> None:
        """Note that requests are served from now on."""
        with self._lock:
            self._serving = True
            self._write()

    def save(self) -> None:
        """Keep `record`."""
        self._cache.write(self._stem, self.record)

    @property
    def place(self) -> Path | None:
        """The file to delete so that everything remembered is forgotten."""
        folder = self._cache.folder
        return folder / f"{self._stem}.json" if folder is not None else None

    def close(self) -> None:
        """Delete the note: this process was told to end, so no size is the cause. Idempotent."""
        with self._lock:
            if self._file is None or self._path is None:
                return
            with suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = self._path = None

    def _write(self) -> None:
        if self._file is None:
            return
        note = Note(
            os.getpid(),
            time.time(),
            limits.boot_id(),
            self._allowed,
            max(self._trying, key=lambda size: size.elements, default=None),
            self._survived,
            self._serving,
            limits.oom_kills(),
        )
        text = msgspec.json.encode(note)
        try:
            if len(text) <= NOTE_BYTES:
                os.pwrite(self._file, text.ljust(NOTE_BYTES), 0)
        except OSError as problem:
            logger.warning("%s cannot be written: %s", self._path, problem.strerror)


def _left(path: Path) -> Iterator[Killed]:
    """The size that ended the process of the note at `path`, if any; the note is deleted."""
    with _dead(path) as note:
        if note is None:
            return
        same_boot = bool(note.boot) and note.boot == limits.boot_id()
        now = limits.oom_kills()
        if note.trying is not None:
            sure = same_boot and limits.was_killed(note.oom_kills, now)
            yield Killed(note.trying.elements, note.trying.rows, note.at, note.allowed, sure)
        # It had survived that size, but later other sizes and requests were in memory, too.
        elif (
            (largest := note.survived) is not None
            and note.serving
            and same_boot
            and limits.was_killed(note.oom_kills, now, own=True)
        ):
            yield Killed(largest.elements, largest.rows, time.time(), note.allowed, sure=True)


@contextmanager
def _dead(path: Path) -> Iterator[Note | None]:
    """The note at `path`, which is deleted, if its process is dead; else None."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            note = msgspec.json.decode(read_own(path, MAX_BYTES), type=Note)
        except BlockingIOError:
            yield None
            return
        except (OSError, ValueError, msgspec.DecodeError) as problem:
            logger.warning("%s is ignored: %s", path, problem)
            note = None
        yield note
        with suppress(OSError):
            path.unlink()
    finally:
        os.close(file)


def absolve(pid: int) -> None:
    """Delete the notes of the process `pid`, which has ended for another reason than a size."""
    with suppress(Exception):
        for path in (user_cache() / "warm-up").glob("*.trying"):
            with suppress(OSError, ValueError, msgspec.DecodeError):
                if msgspec.json.decode(read_own(path, MAX_BYTES), type=Note).pid == pid:
                    path.unlink()
