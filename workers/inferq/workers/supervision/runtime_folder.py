"""Where the workers of one user and host tell how they are: a folder that nobody else can write.

    $XDG_RUNTIME_DIR/inferq   where there is one, which ends with the user's last session
    <tmp>/inferq-<uid>        elsewhere

What stands there decides what a supervisor does to its workers. So whoever uses it looks at it each
time: temporary folders are shared, and another user may have made one of that name, or make it as
soon as it is gone.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError

#: Where a login's runtime folder is on Linux, for who was started without its environment.
_LOGINS: Final = Path("/run/user")
_VARIABLE: Final = "XDG_RUNTIME_DIR"
_INSTEAD: Final = (
    "expected a folder of your own with mode 700, since it tells how your workers are: delete it, "
    f"or set {_VARIABLE} or TMPDIR to a folder that is yours alone"
)


def default() -> Path:
    """The folder for workers that start here. It may not be there yet."""
    return all_known()[0]


def all_known() -> list[Path]:
    """Every folder in which workers of this user may tell how they are."""
    return [*_of_logins(), Path(tempfile.gettempdir()) / f"inferq-{os.geteuid()}"]


def is_known(folder: Path) -> bool:
    """Whether `folder` is one of them; otherwise somebody has named it."""
    return folder in all_known()


def make(folder: Path) -> None:
    """Have `folder`, for us alone. ConfigError: it cannot be, or is not ours alone."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as failure:
        raise ConfigError(f"{folder} cannot be made: {failure.strerror}; {_INSTEAD}") from None
    if (problem := problem_of(folder)) is not None:
        raise ConfigError(problem)


def problem_of(folder: Path) -> str | None:
    """Why nothing that stands in `folder` is to be believed; None: it is ours alone, or not there.

    It goes with the last worker that ends, and the next one makes it again.
    """
    what = _what_others_may(folder) if os.path.lexists(folder) else None
    return None if what is None else f"{folder} {what}; {_INSTEAD}"


def _what_others_may(folder: Path) -> str | None:
    try:
        found = folder.lstat()
    except OSError as problem:
        return f"cannot be looked at: {problem.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    mode = stat.S_IMODE(found.st_mode)
    return f"has mode {mode:o}" if mode & 0o077 else None


def _of_logins() -> Iterator[Path]:
    """Below the session's folder, if that is as it is specified; `su` leaves the former user's."""
    given = os.environ.get(_VARIABLE)
    if given is None and (folder := _LOGINS / str(os.geteuid()) / "inferq").exists():
        yield folder
    elif given and os.path.isabs(given) and _what_others_may(Path(given)) is None:
        yield Path(given) / "inferq"
