"""Copies requests' rows into a batch without giving the GIL away for each of them.

NumPy releases the GIL around each copy of more than `UNRELEASED_ELEMENTS`. Beside a thread that
computes in Python it is back after the switch interval only: 5 ms for each request, where all
copies of a batch take less than one. A copy between two memoryviews keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from inferq.shared.schema import Array

#: NumPy's own threshold (NPY_BEGIN_THREADS_THRESHOLDED): up to so many it keeps the GIL.
UNRELEASED_ELEMENTS: Final = 500
#: Most bytes of one copy with the GIL held, about a millisecond. Others run during a longer one.
HELD_BYTES: Final = 8 << 20
#: Kinds of dtype whose buffers are plain bytes.
_PLAIN: Final = "biufc"


def join(parts: Sequence[Array], into: Array) -> None:
    """Each part's rows to their place in `into`, in order; what is left repeats the last row.

    ValueError, TypeError: a part's rows are not of the shape and dtype of those of `into`, but for
    the order of bytes; or they are more.
    """
    tail = into.shape[1:]
    row = math.prod(tail)
    if max(map(len, parts)) * row <= UNRELEASED_ELEMENTS or not _is_plain(into):
        rows = sum(map(len, parts))
        np.concatenate(parts, out=into[:rows], casting="equiv")
    else:
        rows = _join_held(parts, into, tail, row * into.itemsize)
    if rows < len(into):
        _repeat_last(into, rows)


def _join_held(parts: Sequence[Array], into: Array, tail: tuple[int, ...], row_bytes: int) -> int:
    """How many rows it were."""
    dtype, most = into.dtype, HELD_BYTES
    place = into.data.cast("B")
    at = 0
    for part in parts:
        end = at + len(part)
        if (
            part.dtype == dtype
            and part.shape[1:] == tail
            and 0 < part.nbytes <= most
            and part.flags.c_contiguous
        ):
            place[at * row_bytes : end * row_bytes] = part.data.cast("B")
        else:
            np.concatenate((part,), out=into[at:end], casting="equiv")
        at = end
    return at


def _repeat_last(into: Array, rows: int) -> None:
    """Fill `into` up with its last row of `rows`."""
    # A slice: a row that is one string would be no array.
    last, left = into[rows - 1 : rows], len(into) - rows
    if left * last.size <= UNRELEASED_ELEMENTS or not _is_plain(into) or last.nbytes > HELD_BYTES:
        into[rows:] = last
        return
    place, size = into.data.cast("B"), last.nbytes
    at, end = rows * size, into.nbytes
    most = HELD_BYTES // size * size
    begin = at - size
    while at < end:  # twice as much each time
        count = min(at - begin, end - at, most)
        place[at : at + count] = place[begin : begin + count]
        at += count


def copy(source: Array, into: Array) -> None:
    """All of `source` to `into`, of the same shape and, but for the order of bytes, dtype.

    ValueError, TypeError: it is not.
    """
    if source.shape != into.shape:
        raise ValueError(f"shape is {source.shape}; expected {into.shape}")
    if (
        source.size > UNRELEASED_ELEMENTS
        and source.nbytes <= HELD_BYTES
        and source.dtype == into.dtype
        and source.flags.c_contiguous
        and _is_plain(into)
    ):
        into.data.cast("B")[:] = source.data.cast("B")
    else:
        np.copyto(into, source, casting="equiv")


def copied(array: Array) -> Array:
    """A copy in memory of its own."""
    made: Array = np.empty(array.shape, array.dtype)
    copy(array, made)
    return made


def _is_plain(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in _PLAIN and array.flags.c_contiguous
