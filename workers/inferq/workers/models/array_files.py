"""Arrays from .npy and .npz files and to .npz files, NumPy's own formats; strings from text files.

What is read is not trusted: nothing is unpickled, and no more memory is taken than the bytes that
are there, which are bounded, and for an .npz also once they are unpacked.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.lib import format as npy

from inferq.shared.errors import ConfigError
from inferq.shared.schema import MAX_TENSORS, Array
from inferq.shared.text import BYTES, kind_of, of_elements

#: Most bytes of one file, and of the arrays in it.
MAX_BYTES: Final = 512 * 1024 * 1024
_HEADERS: Final = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(path: Path) -> Array:
    """The array in a .npy file. ConfigError: it cannot be read, or is none."""
    try:
        with path.open("rb") as file:
            return _npy(_bounded(file, str(path)), str(path))
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror or problem}") from None


def read_lines(path: Path) -> Array:
    """The lines of a UTF-8 file, a string each. ConfigError: it cannot be read, or is none."""
    try:
        with path.open("rb") as file:
            text = _bounded(file, str(path)).decode()
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is no UTF-8 at byte {problem.start}; expected text") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    return of_elements([line.removesuffix("\r") for line in lines], [len(lines)])


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays in an .npz file, by name. ConfigError: it cannot be read, or is none."""
    try:
        with path.open("rb") as file:
            return unpack_npz(file, str(path))
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror or problem}") from None


def unpack_npz(file: IO[bytes], what: str) -> dict[str, Array]:
    """The arrays in an open .npz file, which messages call `what`. ConfigError: it is none."""
    data = io.BytesIO(_bounded(file, what))
    try:
        with zipfile.ZipFile(data) as archive:
            members = archive.infolist()
            if len(members) > MAX_TENSORS:
                raise ConfigError(
                    f"{what} has {len(members)} arrays; expected at most {MAX_TENSORS}"
                )
            unpacked = sum(member.file_size for member in members)
            if unpacked > MAX_BYTES:
                raise ConfigError(
                    f"{what} unpacks to {unpacked} bytes; expected at most {MAX_BYTES}"
                )
            found = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in found:
                    raise ConfigError(f"{what} has {name!r} twice; expected each array once")
                with archive.open(member) as content:
                    found[name] = _npy(content.read(member.file_size), f"{what}: {name}")
            return found
    except ConfigError:
        raise
    except Exception as problem:  # noqa: BLE001 - a damaged archive raises nearly anything
        raise ConfigError(f"{what} is no .npz ({problem}); expected what np.savez writes") from None


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write `arrays`, all or nothing. ConfigError: the file cannot be written."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem.strerror or problem}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for key, array in arrays.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    npy.write_array(member, _without_objects(key, array), allow_pickle=False)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem.strerror or problem}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _without_objects(name: str, array: Array) -> Array:
    """Text as NumPy's own dtypes, which need no pickle. ConfigError: they would not hold it."""
    array = np.asarray(array)
    if not array.dtype.hasobject:
        return array
    flat = array.ravel().tolist()
    longest = max(map(len, flat), default=0)
    size = array.size * longest * (1 if kind_of(array) == BYTES else 4)
    if size > MAX_BYTES:
        raise ConfigError(
            f"{name!r} takes {size} bytes in an .npz, where each element takes those of the "
            f"longest; expected at most {MAX_BYTES}"
        )
    made = array.astype("S" if kind_of(array) == BYTES else "U")
    if made.ravel().tolist() != flat:
        raise ConfigError(f"{name!r} has an element that ends in NUL, which an .npz does not keep")
    return made


def _bounded(file: IO[bytes], what: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{what} is too large; expected at most {MAX_BYTES} bytes")
    return data


def _npy(data: bytes, what: str) -> Array:
    content = io.BytesIO(data)
    try:
        read_header = _HEADERS[npy.read_magic(content)]
        shape, fortran, dtype = read_header(content)
    except Exception as problem:  # noqa: BLE001 - a damaged header raises nearly anything
        raise ConfigError(f"{what} is no .npy ({problem}); expected what np.save writes") from None
    if dtype.hasobject:
        raise ConfigError(f"{what} holds Python objects; expected numbers, or dtype U or S")
    size, left = math.prod(shape) * dtype.itemsize, len(data) - content.tell()
    if min(shape, default=0) < 0 or size != left:
        raise ConfigError(f"{what} has {left} bytes of data; expected {size} for shape {shape}")
    try:
        flat = np.frombuffer(data, dtype, math.prod(shape), content.tell()) if size else None
        array = np.empty(0, dtype) if flat is None else flat
        return array.reshape(shape, order="F" if fortran else "C")
    except ValueError as problem:
        raise ConfigError(f"{what} is no array of NumPy: {problem}") from None
