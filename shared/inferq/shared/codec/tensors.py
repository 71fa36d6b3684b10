"""Tensors: ``{"dtype": "<f4", "shape": [..], "data": bytes}``.

JSON writes `data` as base64 text (or as kombu's JSON writes bytes), or as nested lists; a
claim-checked tensor has ``"key"`` in place of ``"data"``. Text, whose dtypes are ``string`` and
``bytes``, has a layout of its own (`strings`), and stands in JSON as nested lists.
"""

from __future__ import annotations

import binascii
import math
from typing import Any, Final

import numpy as np
import pybase64

from inferq.shared.codec.content import brief, kombu_bytes
from inferq.shared.codec.lists import array_of, is_list
from inferq.shared.codec.strings import decode_text, pack_text
from inferq.shared.errors import InvalidInput
from inferq.shared.schema import MAX_DIMS, NUMBERS, WIRE_DTYPES, Array
from inferq.shared.text import OBJECT, TEXT, dtype_name, kind_of

_NUMBERS: Final = (list, int, float)
_OBJECT: Final = OBJECT.str
_ON_THE_WIRE: Final = (*WIRE_DTYPES, *TEXT)


def wire_array(name: str, value: object) -> Array:
    """`value` as numbers that can be sent: contiguous, little-endian, of a dtype in NUMBERS.

    Lists get the dtype that NumPy chooses.
    """
    if is_list(value):
        return array_of(name, value, None)
    array = np.asarray(value)
    if array.dtype.name not in NUMBERS:
        raise InvalidInput(
            f"input {name!r}: dtype {array.dtype.name}; expected one of {', '.join(NUMBERS)}"
        )
    if array.ndim > MAX_DIMS:
        raise InvalidInput(f"input {name!r}: {array.ndim} dims; expected at most {MAX_DIMS}")
    wire = array.astype(NUMBERS[array.dtype.name], copy=False)
    return wire if wire.flags.c_contiguous else np.ascontiguousarray(wire)


def tensor_bytes(array: Array) -> bytes | memoryview:
    """The bytes of a contiguous array, not copied if it is large."""
    if array.nbytes > 16_384 and array.ndim and array.flags.c_contiguous:
        return array.data.cast("B")
    return array.tobytes()


def encode_tensor(array: Array) -> dict[str, Any]:
    """A tensor's msgpack form."""
    dtype = array.dtype.str
    if dtype == _OBJECT:
        return {"dtype": kind_of(array), "shape": array.shape, "data": pack_text(array)}
    return {"dtype": dtype, "shape": array.shape, "data": tensor_bytes(array)}


def encode_reference(array: Array, key: str, size: int | None = None) -> dict[str, Any]:
    """A claim-checked tensor: its bytes stand under `key`.

    `size`: how many they are; of numbers, dtype and shape say it.
    """
    if array.dtype.hasobject:
        return {"dtype": dtype_name(array), "shape": array.shape, "key": key, "size": size}
    return {"dtype": array.dtype.str, "shape": array.shape, "key": key}


def reference_of(tensor: object) -> str | None:
    """The payload key of a claim-checked tensor, else None."""
    if isinstance(tensor, dict) and "data" not in tensor:
        key = tensor.get("key")
        return key if isinstance(key, str) else None
    return None


def is_lists(tensor: object) -> bool:
    """Whether a tensor is written as nested lists, or as one element, rather than as bytes."""
    if isinstance(tensor, dict):
        return isinstance(tensor.get("data"), _NUMBERS)
    return isinstance(tensor, (*_NUMBERS, str))


def decode_tensor(  # noqa: C901, PLR0912 - for each tensor of a request: a call costs more
    name: str, tensor: object, dtype: str | None = None
) -> Array:
    """A tensor from its wire form. InvalidInput names `name` and what is wrong.

    Nested lists, or one number for a scalar, may stand alone (then `dtype` is the model's) or as
    ``data``. The array is read-only if it shares the message's bytes. `dtype`: see above; None:
    whatever the tensor says.
    """
    if dtype in TEXT or (dtype is None and _says_text(tensor)):
        return _text(name, tensor, dtype)
    if isinstance(tensor, _NUMBERS):
        return array_of(name, tensor, _known(name, dtype))
    if not isinstance(tensor, dict):
        raise InvalidInput(
            f"input {name!r}: {type(tensor).__name__}; "
            "expected {'dtype', 'shape', 'data'} or nested lists"
        )
    kind, shape, data = tensor.get("dtype"), tensor.get("shape"), tensor.get("data")
    if isinstance(data, _NUMBERS):
        array = array_of(name, data, _known(name, kind if isinstance(kind, str) else dtype))
        if not array.size and isinstance(shape, list) and _holds_nothing(array, shape):
            return array.reshape(shape)  # lists end where nothing is in them
        if shape is not None and list(array.shape) != shape:
            raise InvalidInput(
                f"input {name!r}: nested lists of shape {list(array.shape)}; "
                f"expected {brief(shape)}, the shape beside them"
            )
        return array
    real = _dtype(name, kind)
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > MAX_DIMS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise InvalidInput(
            f"input {name!r}: shape {brief(shape)}; expected a list of at most {MAX_DIMS} sizes"
        )
    if isinstance(data, dict):
        data = kombu_bytes(data)
    if isinstance(data, str):
        try:
            data = pybase64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as problem:
            raise InvalidInput(f"input {name!r}: data is not base64: {problem}") from problem
    if not isinstance(data, bytes | memoryview):
        raise InvalidInput(f"input {name!r}: data is {type(data).__name__}; expected bytes")
    expected = math.prod(shape) * real.itemsize
    if len(data) != expected:
        raise InvalidInput(
            f"input {name!r}: {len(data)} bytes of data; "
            f"expected {expected} for shape {list(shape)} of {real.name}"
        )
    try:
        return np.frombuffer(data, real).reshape(shape)
    except (ValueError, OverflowError) as problem:  # no element, yet a size that no array can have
        raise InvalidInput(f"input {name!r}: shape {brief(shape)}: {problem}") from problem


def _holds_nothing(array: Array, shape: list[Any]) -> bool:
    """Whether `shape` is one without elements that begins as that of `array` does."""
    sizes = len(shape) <= MAX_DIMS and all(type(size) is int and size >= 0 for size in shape)
    return sizes and list(array.shape) == shape[: array.ndim] and math.prod(shape) == 0


def _says_text(tensor: object) -> bool:
    kind = tensor.get("dtype") if isinstance(tensor, dict) else None
    return isinstance(kind, str) and kind in TEXT


def _text(name: str, tensor: object, dtype: str | None) -> Array:
    """A tensor of the text `dtype` (None: of its own), refused before it is read if it is none."""
    said, shape = dtype, None
    if isinstance(tensor, dict):
        said, shape = tensor.get("dtype", dtype), tensor.get("shape")
    if isinstance(said, str) and said in TEXT:
        # An array of no elements does not say of which kind these are.
        empty = isinstance(shape, list | tuple) and 0 in shape
        if dtype in (said, None) or empty:
            return decode_text(name, tensor, dtype or said)
    raise InvalidInput(f"input {name!r}: dtype {brief(said)}; expected {dtype}")


def _known(name: str, kind: str | None) -> np.dtype[Any] | None:
    return None if kind is None else _dtype(name, kind)


def _dtype(name: str, kind: object) -> np.dtype[Any]:
    found = (WIRE_DTYPES.get(kind) or NUMBERS.get(kind)) if isinstance(kind, str) else None
    if found is None:
        raise InvalidInput(
            f"input {name!r}: dtype {brief(kind)}; expected one of {', '.join(_ON_THE_WIRE)}"
        )
    return found
