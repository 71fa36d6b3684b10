"""Tensors of strings and of bytes: offsets and data on the wire, object arrays in memory.

The layout is Arrow's: as many little-endian uint32 as there are elements and one more, where each
element begins in what follows and where the last one ends; then all elements one after another,
strings as UTF-8. It is read without looking at any element by itself before its bounds are known,
stands in a message, under a payload's key or in shared memory, and needs no decoder of messages.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, Final

import numpy as np
import pybase64

from inferq.shared.codec.content import brief, is_shape, kombu_bytes
from inferq.shared.codec.lists import LISTS, MAX_NUMBERS, check_shape, is_list, ragged
from inferq.shared.errors import InvalidInput
from inferq.shared.schema import MAX_DIMS, Array
from inferq.shared.text import (
    BYTES,
    OFFSET_BYTES,
    STRING,
    TEXT,
    NoText,
    check,
    check_elements,
    kind_of,
    of_elements,
    of_numpy,
    utf8,
)

_OFFSET: Final = np.dtype("<u4")
#: Most bytes of all elements of one tensor.
MAX_DATA: Final = (1 << 32) - 1
#: Elements of which offsets are Python's integers at the same time.
_AT_ONCE: Final = 65_536
_LEVELS: Final = LISTS | {np.ndarray}


# --- the layout ----------------------------------------------------------------------------------


def pack_text(array: Array) -> bytes:
    """An object array's offsets and data. NoText: its elements are neither all str nor all bytes,
    or are too many bytes.
    """
    return b"".join(packed_text(array))


def packed_text(array: Array) -> tuple[bytes, bytes]:
    """The same in its two parts: the offsets, and the data."""
    elements: list[Any] = array.ravel().tolist()
    if kind_of(array) == STRING:
        whole = "".join(elements)
        data = utf8(whole)
        if len(data) > len(whole):  # an element has as many bytes as characters only in ASCII
            elements = [each.encode() for each in elements]
    else:
        data = b"".join(elements)
    if len(data) > MAX_DATA:
        raise NoText(f"elements of {len(data)} bytes; expected at most {MAX_DATA} in one tensor")
    ends = accumulate(map(len, elements), initial=0)
    return np.fromiter(ends, _OFFSET, len(elements) + 1).tobytes(), data


def unpack_text(kind: str, data: bytes | memoryview, shape: Sequence[int]) -> Array:
    """The read-only object array that `data` is the layout of; `kind`: ``string`` or ``bytes``.

    NoText says what is wrong with it. It takes no more memory than the elements do, and the data
    once more.
    """
    count = math.prod(shape)
    head = (count + 1) * OFFSET_BYTES
    if len(data) < head:
        raise NoText(
            f"{len(data)} bytes of data; expected at least {head}: offsets for {count} elements"
        )
    offsets = np.frombuffer(data, _OFFSET, count + 1)
    body = memoryview(data)[head:]
    if offsets[0] or offsets[-1] != len(body) or (offsets[1:] < offsets[:-1]).any():
        raise NoText(
            f"offsets that do not ascend from 0 to {len(body)}, which is how many bytes follow them"
        )
    array = np.empty(count, object)
    whole: Any = bytes(body)
    decoded = kind == STRING and not whole.isascii()
    if decoded:
        _check_utf8(whole)
    elif kind == STRING:
        whole = whole.decode("ascii")
    for start in range(0, count, _AT_ONCE):
        ends = offsets[start : start + _AT_ONCE + 1].tolist()
        some = [whole[begin:end] for begin, end in pairwise(ends)]
        array[start : start + len(some)] = _texts(some, start) if decoded else some
    array.flags.writeable = False
    return array.reshape(shape)


def _check_utf8(whole: bytes) -> None:
    try:
        whole.decode()
    except UnicodeDecodeError as problem:
        raise NoText(f"no UTF-8 at byte {problem.start} of the data ({problem.reason})") from None


def _texts(some: Sequence[bytes], start: int) -> list[str]:
    try:
        return [each.decode() for each in some]
    except UnicodeDecodeError as problem:
        place = start + some.index(problem.object)
        raise NoText(f"element {place} begins or ends within a character") from None


# --- as callers and messages write them ----------------------------------------------------------


def text_array(name: str, value: object, kind: str) -> Array:
    """A caller's `value` as an object array of `kind`. InvalidInput names `name`.

    That is an object array, one of NumPy's own text, nested lists, or one element, a scalar.
    """
    wanted = TEXT[kind]
    try:
        if isinstance(value, wanted) or is_list(value):
            return _of_lists(name, value, kind, None)
        array = np.asarray(value)
        if not array.dtype.hasobject:
            converted = of_numpy(array)
            if converted is None or (converted.size and kind_of(converted) != kind):
                raise NoText(f"dtype {array.dtype}; expected {kind}: {wanted.__name__} elements")
            array = converted
        check(array, kind)
    except NoText as problem:
        raise InvalidInput(f"input {name!r}: {problem}") from None
    if array.ndim > MAX_DIMS:
        raise InvalidInput(f"input {name!r}: {array.ndim} dims; expected at most {MAX_DIMS}")
    return array


def decode_text(name: str, tensor: object, kind: str) -> Array:
    """A tensor of `kind` from a message. InvalidInput names `name` and what is wrong.

    Bytes are the layout. All else is elements, in nested lists or one by itself: of strings they
    are as they are; of bytes they are bytes, or base64 where the message is JSON.
    """
    shape: object = None
    data = tensor
    if isinstance(tensor, dict) and "data" in tensor:
        shape, data = tensor.get("shape"), tensor["data"]
        if isinstance(data, dict):
            data = kombu_bytes(data)
        if isinstance(data, bytes | memoryview):
            try:
                return unpack_text(kind, data, _checked_shape(name, shape))
            except (NoText, ValueError, OverflowError) as problem:
                raise InvalidInput(f"input {name!r}: {problem}") from None
    try:
        array = _of_lists(name, data, kind, _from_json if kind == BYTES else None)
    except NoText as problem:
        raise InvalidInput(f"input {name!r}: {problem}") from None
    if is_shape(shape) and not math.prod(shape) and not array.size:
        return _reshaped(name, array, shape)  # lists of nothing do not say all their dims
    if shape is not None and list(array.shape) != shape:
        raise InvalidInput(
            f"input {name!r}: nested lists of shape {list(array.shape)}; "
            f"expected {brief(shape)}, the shape beside them"
        )
    return array


def _reshaped(name: str, array: Array, shape: Sequence[int]) -> Array:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as problem:
        raise InvalidInput(f"input {name!r}: shape {brief(shape)}: {problem}") from None


def json_text(array: Array) -> object:
    """Nested lists of strings, or of base64 of bytes; of a scalar its element."""
    if kind_of(array) == STRING:
        return array.tolist()
    flat = [pybase64.b64encode_as_string(each) for each in array.ravel().tolist()]
    return of_elements(flat, array.shape).tolist()


def _of_lists(name: str, value: object, kind: str, element: Callable[[Any], Any] | None) -> Array:
    shape: list[int] = []
    level: Sequence[Any] = [value]
    while not (kinds := set(map(type, level))).isdisjoint(_LEVELS):
        if np.ndarray in kinds:
            level = [each.tolist() if isinstance(each, np.ndarray) else each for each in level]
            continue
        if not kinds <= LISTS:
            raise ragged(name, "elements and lists of them")
        sizes = set(map(len, level))
        if len(sizes) > 1:
            raise ragged(name, f"lists of {min(sizes)} and of {max(sizes)}")
        shape.append(sizes.pop())
        check_shape(name, shape)
        if math.prod(shape) > MAX_NUMBERS:
            raise NoText(f"nested lists of more than {MAX_NUMBERS} elements; expected at most that")
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
    if element is not None:
        level = [element(each) for each in level]
    check_elements(level, kind)
    return of_elements(level, shape)


def _from_json(element: object) -> object:
    """Bytes, from base64 if they are none."""
    if isinstance(element, dict):
        element = kombu_bytes(element)
    if not isinstance(element, str):
        return element
    try:
        return pybase64.b64decode(element, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise NoText(f"an element is not base64: {problem}") from None


def _checked_shape(name: str, shape: object) -> Sequence[int]:
    if is_shape(shape):
        return shape
    raise InvalidInput(
        f"input {name!r}: shape {brief(shape)}; expected a list of at most {MAX_DIMS} sizes"
    )
