"""Reads and writes results as Celery's Redis backend does, with a receipt beside ``result``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pybase64

from inferq.shared.codec.content import MSGPACK, MalformedMessage, from_json, pack, unpack
from inferq.shared.codec.strings import json_text, unpack_text
from inferq.shared.codec.tensors import decode_tensor, encode_tensor
from inferq.shared.errors import InferqError, PayloadTooLarge, to_wire
from inferq.shared.schema import MAX_DIMS, MAX_TENSORS, WIRE_DTYPES, Array, Receipt, Tensors
from inferq.shared.text import TEXT, kind_of


def encode_success(
    request_id: str,
    outputs: Tensors,
    receipt: Mapping[str, Any],
    date_done: str,
    content_type: str = MSGPACK,
    *,
    lists: bool = False,
    extra: Mapping[str, Any] | None = None,
    nan: str = "bare",
) -> bytes:
    """A SUCCESS meta as Celery's Redis backend writes it; ``result`` maps outputs to tensors.

    `nan`: how NaN and infinity stand in nested lists (`Settings.json_nan`).
    """
    result: dict[str, Any]
    if content_type == MSGPACK:
        result = {name: encode_tensor(array) for name, array in outputs.items()}
    else:
        result = {name: _json_tensor(array, lists, nan) for name, array in outputs.items()}
    return encode_meta("SUCCESS", request_id, result, date_done, content_type, receipt, extra)


def _json_tensor(array: Array, lists: bool, nan: str) -> dict[str, Any]:
    """With nested lists if wanted. JSON has no complex numbers, so theirs are bytes in any case;
    text is nested lists in any case.
    """
    dtype, data = array.dtype.str, None
    if array.dtype.hasobject:
        dtype, data = kind_of(array), json_text(array)
    elif lists and array.dtype.kind != "c":
        data = _finite(array, nan)
    else:
        data = pybase64.b64encode_as_string(array.tobytes())
    return {"dtype": dtype, "shape": array.shape, "data": data}


def _finite(array: Array, nan: str) -> object:
    """Nested lists, with NaN and infinity as `nan` says."""
    if nan == "bare" or array.dtype.kind != "f" or (finite := np.isfinite(array)).all():
        return array.tolist()
    written = np.array(array.tolist(), dtype=object)
    for place in np.argwhere(~finite):
        value = array[tuple(place)]
        written[tuple(place)] = None if nan == "null" else json.dumps(float(value))
    return written.tolist()


def encode_failure(
    request_id: str,
    error: InferqError,
    date_done: str,
    content_type: str = MSGPACK,
    *,
    receipt: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """A FAILURE meta that stock Celery raises by name and our client by class."""
    return encode_meta(
        "FAILURE", request_id, to_wire(error), date_done, content_type, receipt, extra
    )


def encode_revoked(
    request_id: str, reason: str, date_done: str, content_type: str = MSGPACK
) -> bytes:
    """A REVOKED meta as Celery's workers write it; `reason`: revoked, expired, cancelled."""
    result = {
        "exc_type": "TaskRevokedError",
        "exc_message": [reason],
        "exc_module": "celery.exceptions",
        "code": "cancelled",
    }
    return encode_meta("REVOKED", request_id, result, date_done, content_type, None, None)


def encode_meta(
    status: str,
    request_id: str,
    result: object,
    date_done: str,
    content_type: str,
    receipt: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> bytes:
    """A result meta: Celery's keys, a ``receipt``, and `extra` (``group_id``, ``parent_id``)."""
    meta: dict[str, Any] = {
        "status": status, "result": result, "traceback": None, "children": [],
        "date_done": date_done, "task_id": request_id,
    }  # fmt: skip
    if receipt is not None:
        meta["receipt"] = receipt
    if extra:
        meta.update(extra)
    if content_type == MSGPACK:
        try:
            return pack(meta)
        except (ValueError, OverflowError) as problem:
            raise PayloadTooLarge(f"the result does not fit a message: {problem}") from problem
    return json.dumps(meta, separators=(",", ":")).encode()


def decode_meta(data: bytes) -> dict[str, Any]:
    """A result meta from either serialiser. MalformedMessage if it is neither."""
    try:
        meta = from_json(data) if data[:1] == b"{" else unpack(data)
    except (ValueError, msgspec.DecodeError, RecursionError) as problem:
        raise MalformedMessage(f"not a result: {problem}") from problem
    if not isinstance(meta, dict) or not isinstance(meta.get("status"), str):
        raise MalformedMessage("not a result: no status")
    return meta


def decode_outputs(result: object) -> dict[str, Array]:
    """The arrays of a SUCCESS meta's ``result``."""
    if not isinstance(result, dict) or len(result) > MAX_TENSORS:
        raise MalformedMessage("not a result: outputs are no mapping")
    return {str(name): decode_tensor(str(name), tensor) for name, tensor in result.items()}


class _WireTensor(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class _WireMeta(msgspec.Struct):
    status: str
    result: msgspec.Raw
    receipt: Receipt | None = None


class _BareMeta(msgspec.Struct):
    """A meta whose receipt may have other fields: a worker of another version wrote it."""

    status: str
    result: msgspec.Raw


def _odd(shape: tuple[int, ...]) -> bool:
    return len(shape) > MAX_DIMS or min(shape, default=0) < 0


_meta_decoder = msgspec.msgpack.Decoder(_WireMeta)
_bare_decoder = msgspec.msgpack.Decoder(_BareMeta)
_outputs_decoder = msgspec.msgpack.Decoder(dict[str, _WireTensor])


def decode_success(data: bytes) -> tuple[dict[str, Array], Receipt | None] | None:
    """Outputs and receipt of a msgpack SUCCESS meta, without copying the tensors out of `data`.

    None for anything else; `decode_meta` and `decode_outputs` say what is wrong with it.
    """
    receipt: Receipt | None = None
    try:
        try:
            known = _meta_decoder.decode(data)
            status, result, receipt = known.status, known.result, known.receipt
        except msgspec.ValidationError:
            bare = _bare_decoder.decode(data)
            status, result = bare.status, bare.result
        if status != "SUCCESS":
            return None
        tensors = _outputs_decoder.decode(result)
        if len(tensors) > MAX_TENSORS or any(_odd(t.shape) for t in tensors.values()):
            return None
        outputs = {name: _array(tensor) for name, tensor in tensors.items()}
    except (msgspec.DecodeError, ValueError, OverflowError, KeyError, RecursionError):
        return None
    return outputs, receipt


def _array(tensor: _WireTensor) -> Array:
    try:
        dtype = WIRE_DTYPES[tensor.dtype]
    except KeyError:
        if tensor.dtype not in TEXT:
            raise
        return unpack_text(tensor.dtype, tensor.data, tensor.shape)
    flat = np.frombuffer(tensor.data, dtype) if tensor.data.nbytes else np.empty(0, dtype)
    return flat.reshape(tensor.shape)
