"""Keeps what warm-up measured for the next start: a small JSON file for each model and machine.

    <model>.<version>.<key>.json             run times, and sizes that ended a process
    <model>.<version>.<key>.<token>.trying   a live process' note (see `notes`)

They are in inferq/warm-up of the user's cache, written for the user alone and read only if they are
the user's own. Nothing in them is code. Damaged or foreign files are ignored with a log line.
Without such a folder everything is measured at each start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.process.own_files import read_own, write_own
from inferq.workers.process.user_cache import user_cache

logger = logging.getLogger(__name__)

FORMAT: Final = 1
MAX_BYTES: Final = 64 << 10
MAX_KILLED: Final = 16
#: A file is deleted after so long without a write, and a size that ended a process is tried again.
KEPT_S: Final = 30 * 86_400.0
#: Most files in the folder; the oldest go.
MAX_FILES: Final = 512
_MAX_ROWS: Final = 1 << 31
_MAX_S: Final = 1e6


class Killed(msgspec.Struct, frozen=True):
    """A size that ran for the first time, or was the largest so far, when a process ended."""

    #: Elements of the inputs, and their rows.
    elements: int
    rows: int
    #: Unix s.
    at: float
    #: The memory that was allowed then, in bytes.
    allowed: int
    #: The kernel killed for lack of memory, or it happened twice. Otherwise only one start stays
    #: below that size; the next one tries it again.
    sure: bool
    #: Whether a start has stayed below that size.
    heeded: bool = False


class Record(msgspec.Struct):
    """What is kept for one model on one machine."""

    format: int = FORMAT
    #: Rows → seconds of a batch, all lanes at work.
    seconds: dict[int, float] = {}
    killed: list[Killed] = []
    #: How many those were; 0: not known.
    lanes: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether all values are possible."""
        return self.format == FORMAT and all(
            0 < rows < _MAX_ROWS and 0 < taken < _MAX_S for rows, taken in self.seconds.items()
        )


def key_of(parts: Mapping[str, Any]) -> str:
    """The SHA-256 of `parts`: records with other parts get another key."""
    text = msgspec.json.encode({"format": FORMAT, **parts}, order="deterministic")
    return hashlib.sha256(text).hexdigest()


def files_digest(folder: Path) -> str:
    """SHA-256 of all files in a version's folder: the model, and weights beside it. OSError."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            total.update(str(path.relative_to(folder)).encode(errors="surrogateescape") + b"\0")
            total.update(digest)
    return total.hexdigest()


@dataclass
class Cache:
    """The folder; `open` makes it. No method raises: what is not kept is only measured again."""

    folder: Path | None = None

    def open(self) -> None:
        """Make the folder, and delete old files in it."""
        try:
            if self.folder is None:
                self.folder = user_cache() / "warm-up"
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(0, "others may write it; expected it to be yours alone")
            self._sweep()
        except (OSError, ConfigError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            logger.info("%s: what warm-up measures is not kept (%s)", self.folder, reason)
            self.folder = None

    def read(self, stem: str) -> Record:
        """The record that was kept; an empty one if there is none, or a damaged one."""
        if self.folder is None:
            return Record()
        path = self.folder / f"{stem}.json"
        try:
            record = msgspec.json.decode(read_own(path, MAX_BYTES), type=Record, strict=False)
            if not record.is_sound:
                raise ValueError("not what is written there")
        except FileNotFoundError:
            return Record()
        except (OSError, ValueError, msgspec.DecodeError) as problem:
            logger.warning("%s is ignored: %s", path, getattr(problem, "strerror", problem))
            return Record()
        return record

    def write(self, stem: str, record: Record) -> None:
        """Replace what is kept, in one step."""
        if self.folder is None:
            return
        path = self.folder / f"{stem}.json"
        record.killed = record.killed[-MAX_KILLED:]
        try:
            write_own(path, msgspec.json.encode(record))
        except OSError as problem:
            logger.warning("%s cannot be written: %s", path, problem.strerror)

    def _sweep(self) -> None:
        assert self.folder is not None
        entries: list[tuple[float, str]] = []
        with os.scandir(self.folder) as found:
            for entry in found:
                with suppress(OSError):
                    entries.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
        entries.sort()
        oldest = time.time() - KEPT_S
        for number, (written, path) in enumerate(entries):
            if written < oldest or number < len(entries) - MAX_FILES:
                with suppress(OSError):
                    os.unlink(path)
