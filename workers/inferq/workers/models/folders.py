"""Tells which folders of a repository hold a model, and which are something else.

A model's folder has a model.toml, or the folder of a version, whose name is a whole number.
Everything else in a repository (docs/, __pycache__, lost+found) is ignored.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.names import is_model_name
from inferq.workers.models.registry import model_files

TOML: Final = "model.toml"
#: In the environment: folders outside the repository to which its links may lead.
TRUSTED_ROOTS: Final = "INFERQ_TRUSTED_ROOTS"
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Folders:
    """The entries of a repository; each list is sorted."""

    #: Folders that hold a model, or were meant to. Their names may be invalid.
    models: tuple[str, ...]
    #: Folders that hold no model.
    others: tuple[str, ...]
    #: Files, and hidden entries.
    rest: tuple[str, ...]


def look_through(root: Path) -> Folders:
    """The entries of the repository `root`. ConfigError if that is no readable folder."""
    if not root.is_dir():
        raise ConfigError(f"model repository is {str(root)!r}; expected a folder")
    models, others, rest = [], [], []
    try:
        entries = sorted(root.iterdir())
    except OSError as problem:
        raise ConfigError(f"model repository {str(root)!r} cannot be read: {problem}") from problem
    for entry in entries:
        if entry.name[0] == "." or not _is_folder(entry):
            rest.append(entry.name)
        elif _holds_model(root, entry):
            models.append(entry.name)
        else:
            others.append(entry.name)
    return Folders(tuple(models), tuple(others), tuple(rest))


def inside(root: Path, path: Path) -> Path:
    """`path` with links resolved. ConfigError if that is outside of `root`, and of all folders that
    `TRUSTED_ROOTS` names.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as problem:
        raise ConfigError(f"{path} cannot be followed: {problem}") from problem
    if real.is_relative_to(root.resolve()):
        return real
    if not any(real.is_relative_to(trusted) for trusted in trusted_roots()):
        raise ConfigError(
            f"{path} leads to {real}; expected a place in the repository {root}, or in a folder "
            f"that {TRUSTED_ROOTS} names; `cp -rL` copies what a link leads to"
        )
    return real


def trusted_roots() -> list[Path]:
    """Where else links of the repository may lead, by the environment. ConfigError."""
    roots = []
    for entry in filter(None, os.environ.get(TRUSTED_ROOTS, "").split(os.pathsep)):
        path = Path(entry)
        if not path.is_absolute() or not path.is_dir() or path.resolve() == Path("/"):
            raise ConfigError(
                f"{TRUSTED_ROOTS} has {entry!r}; expected absolute paths of folders, with "
                f"{os.pathsep!r} between them"
            )
        roots.append(path.resolve())
    return roots


def why_no_name(name: str) -> str:
    """Why a folder's name is no valid model name."""
    return (
        f"model name is {name!r}; expected letters, digits, _ . - (at most 100, "
        "the first none of . -)"
    )


def versions_of(folder: Path) -> tuple[int, ...]:
    """The versions that have a folder in a model's `folder`, ascending. OSError."""
    return tuple(sorted(int(entry.name) for entry in folder.iterdir() if _is_version(entry)))


def _is_version(entry: Path) -> bool:
    return _VERSION.fullmatch(entry.name) is not None and entry.is_dir()


def _is_folder(entry: Path) -> bool:
    try:
        # A broken link may have been meant for a version, so it is not ignored.
        return entry.is_dir() or (entry.is_symlink() and not entry.exists())
    except OSError:
        return False


def _holds_model(root: Path, entry: Path) -> bool:
    """Whether `entry` is a model's folder, or may be one; `load_model` then says what is wrong."""
    try:
        if not entry.is_dir() or not entry.resolve().is_relative_to(root.resolve()):
            return True
        return any(
            inner.name == TOML or _is_version(inner) or inner.name in model_files()
            for inner in entry.iterdir()
        )
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return is_model_name(entry.name)
