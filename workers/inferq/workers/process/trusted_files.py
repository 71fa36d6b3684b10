"""Opens, replaces and deletes files that nobody else may write.

Their content is executed. So each file, and each folder above it, must belong to this user or root,
and nobody else may write it. A sticky folder of this user or root, such as /tmp, may be above it:
others cannot replace files of this user there.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError

#: No process writes one file for so long: it was killed while it wrote.
ABANDONED_S: Final = 86_400.0
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_ALONE: Final = "to be writable by you or root alone"
_CODE: Final = "since plans are code"
_CHUNK: Final = 1 << 24
#: The names that `write` gives to unfinished files.
_UNFINISHED: Final = re.compile(r"\..+\.[0-9a-f]{8}")


def make_folder(path: Path) -> None:
    """Make the folder `path`, and missing ones above it, for this user alone. OSError."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700 if each == path else 0o755, exist_ok=True)


def trusted_folder(path: Path, instead: str, because: str = _CODE) -> Path:
    """The folder `path`, links resolved. Nobody but this user and root can write or replace it.

    ConfigError names the folder that others may write; `because` is the reason why they must not,
    `instead` what to do. OSError.
    """
    real = path.resolve(strict=True)
    for each in (*reversed(real.parents), real):
        found = each.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(each))
        above = each != real
        shared = above and bool(found.st_mode & stat.S_ISVTX)
        if problem := problem_of(found, shared=shared):
            what = f"what is above {real}" if above else "it"
            raise ConfigError(f"{each} {problem}; expected {what} {_ALONE}, {because}: {instead}")
    return real


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a regular file that nobody else may write, to read it.

    ConfigError if it is none; OSError.
    """
    # A named pipe would wait for a writer.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is no file; expected one: delete it")
        if problem := problem_of(found):
            raise ConfigError(f"{path} {problem}; expected it {_ALONE}, {_CODE}: delete it")
        yield file
    finally:
        os.close(file)


def read(file: int, most: int) -> bytes:
    """Up to `most` bytes of `file`."""
    with os.fdopen(os.dup(file), "rb") as reader:
        return reader.read(most)


def write(path: Path, content: bytes) -> None:
    """Replace `path` by a file of `content` in one step that survives a power cut. OSError.

    Everybody who may read its folder may read it.
    """
    mode = 0o600 | (path.parent.stat().st_mode & 0o044)
    # Not the pid: two containers that share the folder may have the same one.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        file = os.open(
            new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode
        )
        with os.fdopen(file, "wb") as writer:
            view = memoryview(content)
            for start in range(0, len(view), _CHUNK):
                writer.write(view[start : start + _CHUNK])
            writer.flush()
            os.fsync(writer.fileno())
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path, ours: str) -> None:
    """Delete unfinished files in `folder` of processes that were killed while they wrote.

    These are files whose names begin with `ours`, which only this process writes, and any that are
    a day old.
    """
    oldest = time.time() - ABANDONED_S
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.name.startswith(ours) or (
                    _UNFINISHED.fullmatch(entry.name)
                    and entry.stat(follow_symlinks=False).st_mtime < oldest
                ):
                    os.unlink(entry.path)


def problem_of(found: os.stat_result, *, shared: bool = False) -> str | None:
    """Why others may write the file with status `found`; None: they may not, or it is `shared`."""
    if found.st_uid not in {0, os.geteuid()}:
        return f"belongs to user {found.st_uid}"
    if found.st_mode & _OTHERS and not shared:
        return f"has mode {stat.S_IMODE(found.st_mode):o}"
    return None
