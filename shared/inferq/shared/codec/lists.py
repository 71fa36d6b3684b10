"""Turns nested lists of numbers into an array, and refuses anything else before NumPy sees it.

NumPy looks for a dtype that holds all it is given: for n strings, one of them long, it allocates n
times the longest. So the lists are flattened level by level, in C as far as Python can, and NumPy
gets only numbers, in one flat list. That takes 8 bytes for each number besides the array, which is
less than the lists themselves.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Final, NoReturn

import numpy as np

from inferq.shared.errors import InvalidInput
from inferq.shared.schema import MAX_DIMS, NUMBERS, Array

#: Most numbers of one tensor that is written as lists: as many as a message may have bytes.
MAX_NUMBERS: Final = 512 * 1024 * 1024
LISTS: Final = frozenset({list, tuple})
_NUMBERS: Final = frozenset({bool, int, float, complex})
_FLOAT: Final = frozenset({float})
_INT: Final = frozenset({int})
#: What NumPy reads as one block of bytes.
_BUFFERS: Final = memoryview | bytearray | array
_NO_LISTS: Final = str | bytes | _BUFFERS


def array_of(name: str, lists: object, dtype: np.dtype[Any] | None) -> Array:
    """The numbers of nested `lists` (or one number, a scalar) as `dtype`, if that holds them.

    Without `dtype` it is the one that NumPy chooses. 2.0 is an integer, 2.5 is none. Numbers are
    rounded to a float's precision; an overflow to infinity is refused. InvalidInput names `name`.
    """
    shape: list[int] = []
    flat = _numbers(name, lists, dtype, shape)
    return _fitting(name, flat, dtype).reshape(shape)


def is_list(value: object) -> bool:
    """Whether NumPy would look into `value` item by item."""
    return isinstance(value, Sequence) and not isinstance(value, _NO_LISTS)


def _numbers(name: str, value: object, dtype: np.dtype[Any] | None, shape: list[int]) -> Array:
    """The numbers in `value`, one after another; their shape is added to `shape`."""
    level: Sequence[Any] = [value]
    while True:
        kinds = set(map(type, level))
        if kinds <= _NUMBERS:
            return _flat(name, level, kinds, dtype)
        if not kinds <= LISTS:
            return _unusual(name, level, dtype, shape)
        sizes = set(map(len, level))
        if len(sizes) > 1:
            raise ragged(name, f"lists of {min(sizes)} and of {max(sizes)}")
        shape.append(size := sizes.pop())
        check_shape(name, shape)
        if size and math.prod(shape) > MAX_NUMBERS:
            raise InvalidInput(
                f"input {name!r}: nested lists hold more numbers than {MAX_NUMBERS}; "
                "expected at most as many"
            )
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))


def _flat(name: str, level: Sequence[Any], kinds: set[type], dtype: np.dtype[Any] | None) -> Array:
    """Python's own numbers as an array, as NumPy would convert them, in the cheapest way."""
    if kinds == _FLOAT:
        return np.fromiter(level, np.float64, len(level))
    integers = dtype is not None and dtype.kind in "iu" and complex not in kinds
    if kinds == _INT:
        for kind in (np.int64, np.uint64) if integers else (np.int64,):
            with suppress(OverflowError):
                return np.fromiter(level, kind, len(level))
    elif integers and level:  # converted together, NumPy would change those beyond 2**53
        return _flat(name, _whole(name, level), {int}, dtype)
    return np.array(level)


def _whole(name: str, level: Sequence[Any]) -> list[int]:
    """Integers and floats as the integers that all of them are."""
    try:
        whole = list(map(int, level))
    except (ValueError, OverflowError):  # not finite
        whole = []
    if whole != list(level):
        wrong = next(each for each in level if not float(each).is_integer())
        raise InvalidInput(f"input {name!r}: nested lists hold {wrong}; expected integers")
    return whole


def _unusual(
    name: str, level: Sequence[Any], dtype: np.dtype[Any] | None, shape: list[int]
) -> Array:
    """An array of what lists may also hold: NumPy's numbers and arrays."""
    if all(isinstance(each, np.generic) or type(each) in _NUMBERS for each in level):
        if dtype is None:
            return np.array(level) if _are_numbers(level) else _no_number(name, level)
        plain = [each.item() if isinstance(each, np.generic) else each for each in level]
        kinds = set(map(type, plain))
        return _flat(name, plain, kinds, dtype) if kinds <= _NUMBERS else _no_number(name, plain)
    parts = [_part(name, each, dtype, len(shape)) for each in level]
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        first, other = sorted(shapes)[:2]
        raise ragged(name, f"parts of shape {list(first)} and of {list(other)}")
    shape += shapes.pop()
    check_shape(name, shape)
    return np.concatenate([part.ravel() for part in parts])


def _part(name: str, value: Any, dtype: np.dtype[Any] | None, depth: int) -> Array:
    if is_list(value):
        shape = [0] * depth
        flat = _numbers(name, value if type(value) in LISTS else list(value), dtype, shape)
        return _fitting(name, flat, dtype).reshape(shape[depth:])
    if isinstance(value, int | float | complex | _BUFFERS) or hasattr(value, "__array__"):
        found = np.asarray(value)
        if found.dtype.kind in "biufcO":
            return _fitting(name, found.ravel(), dtype).reshape(found.shape)
    return _no_number(name, [value])


def _are_numbers(level: Sequence[Any]) -> bool:
    return all(np.asarray(each).dtype.kind in "biufc" for each in level)


def _no_number(name: str, level: Sequence[Any]) -> NoReturn:
    kinds = (type(each) for each in level if type(each) not in _NUMBERS)
    wrong = next((kind.__name__ for kind in kinds), "nothing")
    raise InvalidInput(f"input {name!r}: nested lists hold {wrong}; expected numbers")


def check_shape(name: str, shape: Sequence[int]) -> None:
    if len(shape) > MAX_DIMS:
        raise InvalidInput(
            f"input {name!r}: nested lists of more than {MAX_DIMS} dims; expected at most that"
        )


def ragged(name: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"input {name!r}: nested lists are ragged: {what} side by side; "
        "expected the same size in each dim"
    )


def _fitting(name: str, free: Array, dtype: np.dtype[Any] | None) -> Array:
    """`free` as `dtype`, if one is given.

    InvalidInput if that, or any wire dtype, cannot hold it.
    """
    if free.dtype.name not in NUMBERS:
        raise InvalidInput(f"input {name!r}: nested lists hold {_beyond(free)}; expected numbers")
    return free if dtype is None or free.dtype == dtype else _as(name, free, dtype)


def _beyond(free: Array) -> str:
    """Integers beyond 64 bits, which no wire dtype can hold."""
    if free.dtype != object:
        return free.dtype.name
    whole = [each for each in free.flat if isinstance(each, int)]
    return f"an integer of {max(map(int.bit_length, whole))} bits" if whole else "objects"


def _as(name: str, free: Array, dtype: np.dtype[Any]) -> Array:
    """`free`, of another dtype, as `dtype`. InvalidInput if that does not hold all of it."""
    if free.dtype.kind == "c" and dtype.kind != "c":
        raise InvalidInput(f"input {name!r}: nested lists are complex; expected {dtype.name}")
    match dtype.kind:
        case "i" | "u":
            made, lost = _as_integers(free, dtype)
        case "b":
            made = free.astype(dtype)
            lost = made != free
        case _:
            made, lost = _as_floats(free, dtype)
    if lost is not None and lost.any():
        value = free[lost].item(0)
        raise InvalidInput(f"input {name!r}: nested lists hold {value}; expected {dtype.name}")
    return made


def _as_integers(free: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
    info = np.iinfo(dtype)
    if free.dtype.kind == "f":
        free = free.astype(np.float64, copy=False)
        # Casting a float that does not fit is undefined: some processors give the nearest integer.
        fits = (free >= float(info.min)) & (free < 2.0 ** (info.max.bit_length()))
        lost = ~(fits & (np.floor(free) == free))
        return (free if lost.any() else free.astype(dtype)), lost
    if free.dtype.kind == "b" or not free.size:
        return free.astype(dtype), None
    if info.min <= int(free.min()) and int(free.max()) <= info.max:
        return free.astype(dtype), None
    return free, (free < info.min) | (free > info.max)


def _as_floats(free: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
    if free.dtype.kind in "iu":
        free = free.astype(np.float64)  # as Python itself does: integers are rounded twice
    if np.can_cast(free.dtype, dtype, "safe"):
        return free.astype(dtype), None
    if dtype.kind == "c":
        free = free.astype(np.complex128)
    with np.errstate(all="ignore"):
        made = free.astype(dtype)
    beyond = np.isinf(made.view(made.real.dtype))
    if not beyond.any():
        return made, None
    lost = beyond & ~np.isinf(free.view(free.real.dtype))
    return made, lost.reshape(-1, 2).any(axis=1) if dtype.kind == "c" else lost
