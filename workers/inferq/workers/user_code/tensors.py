"""Tensors in shared memory: where each stands, how it is written and read.

Numbers stand there as they are, each tensor at a multiple of `ALIGN`. Text and bytes stand as Arrow
has them, and as messages do: n + 1 offsets (uint32), then the bytes of all elements, one after the
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array, Tensors
from inferq.workers.user_code.memory import Shared

if TYPE_CHECKING:
    from inferq.workers.models.engine import Batch  # which processes of user code need not import

ALIGN: Final = 64
#: The dtypes whose elements are no numbers.
TEXT, BYTES = "string", "bytes"
_OFFSET: Final = np.dtype(np.uint32)
#: Most bytes of all elements of one tensor.
_MAX_DATA: Final = (1 << 32) - 1


class Place(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in shared memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: Bytes.
    offset: int
    size: int


class _Writing:
    """A tensor that is to be written: its form, and what writes it once its place is known."""

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], size: int, to: Callable[[Array], None]
    ) -> None:
        self.name, self.dtype, self.shape, self.size, self.to = name, dtype, shape, size, to


def write_batch(memory: Shared, batch: Batch, dtypes: Mapping[str, str]) -> tuple[list[Place], int]:
    """Write a batch's inputs, joined along dim 0 and padded with copies of the last row.

    `dtypes`: by input. The places, and how many bytes they are in all.
    """
    padding = batch.bucket - batch.rows
    writings = []
    for name, dtype in dtypes.items():
        pieces = [part[name] for part in batch.parts]
        if padding:
            last = pieces[-1][-1:]
            pieces.append(np.broadcast_to(last, (padding, *last.shape[1:])))
        writings.append(_writing(name, dtype, pieces))
    return _write(memory, writings)


def write_arrays(
    memory: Shared, arrays: Tensors, dtypes: Mapping[str, str]
) -> tuple[list[Place], int]:
    """Write `arrays`. The places, and how many bytes they are in all."""
    return _write(memory, [_writing(name, dtypes[name], [a]) for name, a in arrays.items()])


def read_arrays(memory: Shared, places: Iterable[Place], size: int, *, copy: bool) -> Tensors:
    """The tensors at `places`: arrays of one's own (`copy`), or the memory itself where it can be.

    EngineError: they do not stand in `size` bytes that are there.
    """
    whole = memory.read(size)
    return {place.name: _read(whole, place, copy) for place in places}


def _write(memory: Shared, writings: Sequence[_Writing]) -> tuple[list[Place], int]:
    places, end = [], 0
    for each in writings:
        places.append(Place(each.name, each.dtype, each.shape, end, each.size))
        end += -(-each.size // ALIGN) * ALIGN
    room = memory.write(end)
    for each, place in zip(writings, places, strict=True):
        each.to(room[place.offset : place.offset + place.size])
    return places, end


def _writing(name: str, dtype: str, pieces: list[Array]) -> _Writing:
    first = pieces[0]
    shape = first.shape
    if len(pieces) > 1:
        shape = (sum(len(piece) for piece in pieces), *shape[1:])
    if dtype in (TEXT, BYTES):
        return _writing_elements(name, dtype, shape, pieces)

    def write(room: Array) -> None:
        into = room.view(first.dtype).reshape(shape)
        if len(pieces) > 1:
            np.concatenate(pieces, out=into, casting="equiv")
        else:
            into[...] = first

    return _Writing(name, dtype, shape, math.prod(shape) * first.dtype.itemsize, write)


def _writing_elements(
    name: str, dtype: str, shape: tuple[int, ...], pieces: list[Array]
) -> _Writing:
    flat: list[Any] = [each for piece in pieces for each in piece.reshape(-1).tolist()]
    if dtype == TEXT:
        flat = [each.encode("utf-8", "surrogatepass") for each in flat]
    data = b"".join(flat)
    if len(data) > _MAX_DATA:
        raise EngineError(
            f"the elements of {name!r} are {len(data)} bytes in a batch; "
            f"expected at most {_MAX_DATA}"
        )
    offsets = np.fromiter(accumulate(map(len, flat), initial=0), _OFFSET, len(flat) + 1)

    def write(room: Array) -> None:
        room[: offsets.nbytes] = offsets.view(np.uint8)
        room[offsets.nbytes :] = np.frombuffer(data, np.uint8)

    return _Writing(name, dtype, shape, offsets.nbytes + len(data), write)


def _read(whole: Array, place: Place, copy: bool) -> Array:
    there = whole[place.offset : place.offset + place.size]
    if place.dtype in (TEXT, BYTES):
        return _read_elements(there, place)
    array = there.view(np.dtype(place.dtype)).reshape(place.shape)
    return array.copy() if copy else array


def _read_elements(there: Array, place: Place) -> Array:
    count = math.prod(place.shape)
    begin = (count + 1) * _OFFSET.itemsize
    offsets = there[:begin].view(_OFFSET).tolist()
    data = there[begin:].tobytes()
    array = np.empty(count, object)
    for n in range(count):
        element = data[offsets[n] : offsets[n + 1]]
        array[n] = element.decode("utf-8", "surrogatepass") if place.dtype == TEXT else element
    return array.reshape(place.shape)
