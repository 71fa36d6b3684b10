"""Strings and bytes in memory: NumPy object arrays whose elements are all `str`, or all `bytes`.

Tensors of the dtypes ``string`` and ``bytes`` are such arrays, at callers and in engines. What they
are on the wire is `codec.strings`' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STRING: Final = "string"
BYTES: Final = "bytes"
#: dtype → what its elements are.
TEXT: Final[Mapping[str, type[str] | type[bytes]]] = {STRING: str, BYTES: bytes}
#: NumPy's dtype of both.
OBJECT: Final = np.dtype(object)
#: What stands before the data: where each element begins, and where the last one ends.
OFFSET_BYTES: Final = 4
#: About what Python takes for an element beside its characters: a header, and a pointer to it.
HELD_EACH: Final = 64
_NAMES: Final = {str: STRING, bytes: BYTES}
#: NumPy's own arrays of text, by the kind of their dtype.
_NUMPY_KINDS: Final = {"U": STRING, "T": STRING, "S": BYTES}


class NoText(ValueError):
    """An array holds what no tensor of strings or bytes does; says what, and what was expected."""


def dtype_name(array: Array) -> str:
    """The array's dtype as signatures have it: ``float32``, ``string``, ``bytes``."""
    if not array.dtype.hasobject:
        return array.dtype.name
    first = array.flat[0] if array.size else ""
    return BYTES if isinstance(first, bytes) else STRING if isinstance(first, str) else "object"


def kind_of(array: Array) -> str:
    """``string`` or ``bytes``: what all elements are (of none: ``string``). NoText: neither."""
    name = dtype_name(array)
    check(array, name if name in TEXT else STRING)
    return name


def check(array: Array, dtype: str) -> None:
    """NoText unless all elements of an object array are what `dtype` says."""
    check_elements(array.ravel().tolist(), dtype)


def check_elements(flat: Sequence[object], dtype: str) -> None:
    """NoText unless all of `flat` are what `dtype` says."""
    wanted = TEXT[dtype]
    if all(issubclass(kind, wanted) for kind in set(map(type, flat))):
        return
    place = next(n for n, each in enumerate(flat) if not isinstance(each, wanted))
    raise NoText(f"element {place} is {type(flat[place]).__name__}; expected {wanted.__name__}")


def of_numpy(array: Array) -> Array | None:
    """NumPy's own text (dtypes ``U``, ``S`` and StringDType) as objects; None: it is none."""
    return array.astype(OBJECT) if array.dtype.kind in _NUMPY_KINDS else None


def of_elements(flat: Sequence[str] | Sequence[bytes], shape: Sequence[int]) -> Array:
    """An array of these elements, in C order."""
    return np.fromiter(flat, OBJECT, len(flat)).reshape(shape)


def data_bytes(array: Array) -> int:
    """Bytes of all elements together: of strings as UTF-8. NoText: some cannot be written so."""
    flat = array.ravel().tolist()
    if not flat or isinstance(flat[0], bytes):
        return sum(map(len, flat))
    text = "".join(flat)
    return len(text) if text.isascii() else len(utf8(text))


def utf8(text: str) -> bytes:
    """NoText for half a surrogate, which no UTF-8 has."""
    try:
        return text.encode()
    except UnicodeEncodeError as problem:
        raise NoText(
            f"a string holds {problem.object[problem.start]!a}; expected text that UTF-8 can hold"
        ) from None


def packed_bytes(array: Array) -> int:
    """Bytes of a tensor on the wire, as limits count them: its elements', and the offsets."""
    return (array.size + 1) * OFFSET_BYTES + data_bytes(array)


def held_bytes(array: Array) -> int:
    """About what the array takes in memory, its elements included."""
    return array.size * HELD_EACH + data_bytes(array)
