"""Checks that the files of a model's version are all there, and complete.

A copy that has not ended, or failed, leaves an empty folder, the beginning of a file, weights that
are missing or too short, or the pointer that git-lfs puts in a file's place. The files alone show
that, without an engine. Whether an engine accepts a complete file is not checked here.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.workers.models.onnx_file import Malformed, external_data

_POINTER: Final = b"version https://git-lfs.github.com/spec/"


class Incomplete(ConfigError):
    """A version's files are incomplete; the message names the file."""


def check_whole(path: Path) -> None:
    """Raise Incomplete unless the model file `path` and all files it names are there and complete.

    Files outside its folder are not checked: the engine refuses them.
    """
    try:
        _check_file(path)
        if path.suffix == ".onnx":
            _check_onnx(path)
        elif path.suffix == ".pt2":
            _check_archive(path)
    except OSError as problem:
        raise Incomplete(f"{path} cannot be read: {problem.strerror or problem}") from problem


def _check_file(path: Path) -> int:
    """Check a file; returns its size in bytes."""
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if not head:
        raise Incomplete(f"{path} is empty; expected a model")
    if head == _POINTER:
        raise Incomplete(f"{path} is a git-lfs pointer to the file; `git lfs pull` fetches it")
    return path.stat().st_size


def _check_onnx(path: Path) -> None:
    try:
        needed: dict[str, int] = {}
        for each in external_data(path):
            end = each.offset + (each.length or 0)
            needed[each.location] = max(end, needed.get(each.location, 0))
    except Malformed as problem:
        raise Incomplete(f"{path} is no whole ONNX file: {problem}") from problem
    for location, size in needed.items():
        place = path.parent / location
        if not place.resolve().is_relative_to(path.parent.resolve()):
            continue
        if not place.is_file():
            raise Incomplete(f"{place} is missing; expected the data that {path} keeps there")
        found = _check_file(place)
        if found < size:
            raise Incomplete(f"{place} has {found} bytes; expected {size}, as {path} says")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path):  # reads the list of its parts, which is at the end
            pass
    except (ValueError, zipfile.BadZipFile) as problem:
        raise Incomplete(
            f"{path} is no whole .pt2 archive ({problem}); expected what torch.export.save writes"
        ) from problem
