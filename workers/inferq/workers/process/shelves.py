"""Guards the files that Celery and Flower unpickle: nobody else may have written them.

``--statedb`` of a worker and ``--persistent`` of Flower keep a `shelve`. Who can write it can run
any code in the process that reads it.
"""

from __future__ import annotations

import os
import shelve
import stat
from pathlib import Path
from typing import Any, Final

from inferq.shared.errors import ConfigError
from inferq.workers.logs.printing import plain_lines
from inferq.workers.process import trusted_files

#: Suffixes that the kinds of `dbm` add to a shelf's name.
_SUFFIXES: Final = ("", ".db", ".dir", ".pag", ".dat", ".bak")
_BECAUSE: Final = "since it is unpickled"

_stock_open = shelve.open


def guard(option: str) -> None:
    """Keep this process from opening a shelf that somebody else may have written.

    It ends instead, with a line that names `option`, which chooses the shelf.
    """

    def opened(filename: str, *args: Any, **options: Any) -> shelve.Shelf[Any]:
        try:
            check(Path(filename), f"name a file in a folder of your own by {option}")
        except ConfigError as problem:
            raise SystemExit(f"inferq: {plain_lines(problem.message)}") from None
        before = os.umask(0o077)
        try:
            return _stock_open(filename, *args, **options)
        finally:
            os.umask(before)

    shelve.open = opened  # type: ignore[assignment] # as Celery and Flower call it


def check(path: Path, instead: str) -> None:
    """ConfigError if anybody but this user and root may write or replace the shelf `path`."""
    try:
        folder = trusted_files.trusted_folder(path.parent, instead, _BECAUSE)
        for suffix in _SUFFIXES:
            _check_file(folder / f"{path.name}{suffix}", instead)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be looked at: {problem.strerror}; {instead}") from None


def _check_file(path: Path, instead: str) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    what = trusted_files.problem_of(found)
    if not stat.S_ISREG(found.st_mode):
        what = "is no file"
    if what is not None:
        raise ConfigError(
            f"{path} {what}; expected a file that you or root alone can write, {_BECAUSE}: delete "
            f"it, or {instead}"
        )
