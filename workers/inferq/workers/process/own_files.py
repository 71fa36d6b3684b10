"""Small private files of a user: nobody else can have written what is read from them."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def read_own(path: Path, most: int, *, roots: bool = False, anybodys: bool = False) -> bytes:
    """The content of a regular file of this user, at most `most` bytes. OSError, ValueError.

    `roots`: also a file of root. `anybodys`: if this user is root, also anybody's file, and links.
    """
    anybodys = anybodys and os.geteuid() == 0
    links = 0 if anybodys else os.O_NOFOLLOW
    # A named pipe would wait for a writer.
    file = os.open(path, os.O_RDONLY | links | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(file, "rb") as reader:
        found = os.fstat(file)
        owners = {os.geteuid(), 0} if roots else {os.geteuid()}
        if not stat.S_ISREG(found.st_mode) or not (anybodys or found.st_uid in owners):
            raise ValueError("it is no file of this user's")
        content = reader.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content


def write_own(path: Path, content: bytes) -> None:
    """Replace `path` in one step, for this user alone. OSError."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        file = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as writer:
            writer.write(content)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
