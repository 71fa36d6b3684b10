"""Bytes on the wire: Celery's message protocol v2 in kombu's Redis envelope, and Celery's results.

https://docs.celeryq.dev/en/stable/internals/protocol.html describes the message; kombu's virtual
transports wrap it in a JSON envelope whose body is base64. Content is msgpack or JSON, never
pickle or yaml. A tensor is ``{"dtype": "<f4", "shape": [..], "data": bytes}`` where JSON writes
`data` as base64 text (or as kombu's JSON writes bytes), or as nested lists; a claim-checked one
has ``"key"`` in place of ``"data"``.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import numpy as np
import pybase64

from inferq.shared.errors import (
    ConfigError,
    InferqError,
    InvalidInput,
    PayloadTooLarge,
    to_wire,
)
from inferq.shared.schema import (
    DTYPES,
    MAX_DIMS,
    MAX_TENSORS,
    WIRE_DTYPES,
    Array,
    ModelAdvert,
    Receipt,
    Tensors,
    Ticket,
    describe,
)

MSGPACK: Final = "application/x-msgpack"
JSON: Final = "application/json"
#: Most bytes of one message on the queue; a longer one is quarantined unread.
MAX_MESSAGE_BYTES: Final = 512 * 1024 * 1024


class MalformedMessage(ValueError):
    """The bytes are no request that could be answered: not JSON, no id, an unknown content type."""


class Headers(msgspec.Struct):
    """The message headers that the fast path reads; Celery sends more."""

    id: str
    task: str
    eta: str | None = None
    expires: str | None = None
    retries: int | None = 0
    ignore_result: bool | None = False
    group: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    kwargsrepr: str | None = None
    compression: str | None = None
    inferq_reply: str | None = None
    inferq_sent_ms: float | None = None
    inferq_deadline_ms: float | None = None


class Properties(msgspec.Struct):
    """The message properties that the fast path reads."""

    body_encoding: str | None = None
    priority: int | None = None


class Envelope(msgspec.Struct):
    """kombu's Redis envelope; the body is left as it stands until it is needed."""

    body: msgspec.Raw
    headers: Headers
    properties: Properties
    content_type: str = msgspec.field(name="content-type", default=JSON)


#: Inside strings quotes are escaped, so this matches keys alone.
_ID: Final = re.compile(rb'"id": ?"([ !#-\[\]-~]{1,200})"')

_envelope_decoder = msgspec.json.Decoder(Envelope)
_json_decoder = msgspec.json.Decoder()
_STR: Final = frozenset({str})
# msgspec's msgpack: the same bytes as the msgpack package, in half the time.
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode


class Body(msgspec.Struct, frozen=True):
    """A decoded body: the task's arguments and Celery's embedded canvas."""

    args: list[Any]
    kwargs: dict[str, Any]
    embed: dict[str, Any]

    @property
    def has_canvas(self) -> bool:
        """Whether something follows on this request: links, a chain, a chord."""
        get = self.embed.get
        return bool(get("callbacks") or get("errbacks") or get("chain") or get("chord"))


def decode_envelope(raw: bytes) -> Envelope:
    """Read one queue item. MalformedMessage if it is none."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{len(raw)} bytes; expected at most {MAX_MESSAGE_BYTES}")
    try:
        return _envelope_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise MalformedMessage(str(problem)) from problem


def guess_ticket(raw: bytes, model: str) -> Ticket | None:
    """Who asked, looked up in bytes that must not be decoded again; None: they do not say."""
    found = _ID.search(raw)
    if found is None:
        return None
    kind = MSGPACK if MSGPACK.encode() in raw else JSON
    return Ticket(id=found[1].decode(), model=model, content_type=kind)


def decode_body(envelope: Envelope) -> Body:
    """Read an envelope's body. InvalidInput if it is not ``[args, kwargs, embed]``."""
    kind = envelope.content_type
    try:
        data = _body_bytes(envelope)
        if kind == MSGPACK:
            body = _unpack(data)
        elif kind == JSON:
            body = _from_json(data)
        else:
            raise InvalidInput(f"content type {kind!r}; expected {MSGPACK} or {JSON}")
    except (ValueError, msgspec.DecodeError, RecursionError) as problem:
        raise InvalidInput(f"the message body is not {kind}: {problem}") from problem
    if isinstance(body, list | tuple) and len(body) == 3:
        args, kwargs, embed = body
        if (
            isinstance(args, list)
            and isinstance(kwargs, dict)
            and isinstance(embed, dict | None)
            and _STR.issuperset(map(type, kwargs))
        ):
            return Body(args, kwargs, embed or {})
    raise InvalidInput("the message body is not [args, kwargs, embed]")


def _from_json(data: bytes) -> Any:
    try:
        return _json_decoder.decode(data)
    except msgspec.DecodeError:
        # NaN and Infinity are no JSON, but Python's, and so Celery's, writes and reads them. It
        # also lets half a surrogate pass, which no other serialiser takes: encode raises.
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
        return value


def _body_bytes(envelope: Envelope) -> bytes:
    text = memoryview(envelope.body)
    if len(text) < 2 or text[0] != 0x22:
        raise InvalidInput("the message body is not a string")
    if envelope.properties.body_encoding != "base64":
        return bytes(_json_decoder.decode(envelope.body).encode())
    try:
        plain: bytes = pybase64.b64decode(text[1:-1], validate=True)
        return plain
    except (binascii.Error, ValueError):
        pass
    try:  # escaped slashes: the slow way
        plain = pybase64.b64decode(_json_decoder.decode(envelope.body), validate=True)
        return plain
    except (binascii.Error, ValueError) as problem:
        raise InvalidInput(f"the message body is not base64: {problem}") from problem


# --- tensors -------------------------------------------------------------------------------------


def wire_array(name: str, value: object) -> Array:
    """`value` as an array that can travel: contiguous, little-endian, of a dtype in DTYPES."""
    array = np.asarray(value)
    if array.dtype.name not in DTYPES:
        raise InvalidInput(
            f"input {name!r}: dtype {array.dtype.name}; expected one of {', '.join(DTYPES)}"
        )
    if array.ndim > MAX_DIMS:
        raise InvalidInput(f"input {name!r}: {array.ndim} dims; expected at most {MAX_DIMS}")
    wire = array.astype(DTYPES[array.dtype.name], copy=False)
    return wire if wire.flags.c_contiguous else np.ascontiguousarray(wire)


def tensor_bytes(array: Array) -> bytes | memoryview:
    """The bytes of a contiguous array; without copying where that pays."""
    if array.nbytes > 16_384 and array.ndim and array.flags.c_contiguous:
        return array.data.cast("B")
    return array.tobytes()


def encode_tensor(array: Array) -> dict[str, Any]:
    """A tensor's msgpack form."""
    return {"dtype": array.dtype.str, "shape": array.shape, "data": tensor_bytes(array)}


def encode_reference(array: Array, key: str) -> dict[str, Any]:
    """A claim-checked tensor: its bytes stand under `key`."""
    return {"dtype": array.dtype.str, "shape": array.shape, "key": key}


def reference_of(tensor: object) -> str | None:
    """The payload key of a claim-checked tensor, else None."""
    if isinstance(tensor, dict) and "data" not in tensor:
        key = tensor.get("key")
        return key if isinstance(key, str) else None
    return None


_NUMBERS: Final = (list, int, float)


def is_lists(tensor: object) -> bool:
    """Whether a tensor is written as nested lists rather than as bytes."""
    return isinstance(tensor.get("data") if isinstance(tensor, dict) else tensor, _NUMBERS)


def decode_tensor(name: str, tensor: object, dtype: str | None = None) -> Array:
    """A tensor from its wire form. InvalidInput names `name` and what is wrong.

    Nested lists, or one number for a scalar, may stand alone (then `dtype` is the model's) or as
    ``data``. The array is read-only where it shares the message's bytes.
    """
    if isinstance(tensor, _NUMBERS):
        return _from_lists(name, tensor, dtype)
    if not isinstance(tensor, dict):
        raise InvalidInput(
            f"input {name!r}: {type(tensor).__name__}; "
            "expected {'dtype', 'shape', 'data'} or nested lists"
        )
    kind, shape, data = tensor.get("dtype"), tensor.get("shape"), tensor.get("data")
    if isinstance(data, _NUMBERS):
        array = _from_lists(name, data, kind if isinstance(kind, str) else dtype)
        if shape is not None and list(array.shape) != shape:
            raise InvalidInput(
                f"input {name!r}: nested lists of shape {list(array.shape)}; expected {shape!r}"
            )
        return array
    real = _dtype(name, kind)
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > MAX_DIMS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise InvalidInput(
            f"input {name!r}: shape {str(shape)[:80]!r}; "
            f"expected a list of at most {MAX_DIMS} sizes"
        )
    if isinstance(data, dict):
        data = _kombu_bytes(data)
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
    except ValueError as problem:  # no element, yet a size that no array can have
        raise InvalidInput(f"input {name!r}: shape {str(shape)[:80]!r}: {problem}") from problem


def _kombu_bytes(data: Mapping[str, Any]) -> object:
    """Bytes as kombu's JSON writes them: it does so wherever a program puts bytes into a task."""
    match data:
        case {"__type__": "base64", "__value__": str(text)}:
            return text
        case {"__type__": "bytes", "__value__": str(text)}:
            return text.encode()
    return data


def _dtype(name: str, kind: object) -> np.dtype[Any]:
    found = (WIRE_DTYPES.get(kind) or DTYPES.get(kind)) if isinstance(kind, str) else None
    if found is None:
        raise InvalidInput(
            f"input {name!r}: dtype {str(kind)[:40]!r}; expected one of {', '.join(WIRE_DTYPES)}"
        )
    return found


def _from_lists(name: str, lists: Any, kind: str | None) -> Array:
    """The numbers of nested lists, if the dtype holds them: 2.0 is an integer, 2.5 is none.

    Rounding to a float's precision is what everybody expects; overflow to infinity is not.
    """
    dtype = _dtype(name, kind) if kind is not None else None
    try:
        free = wire_array(name, np.array(lists))
        if dtype is None:
            return free
        with np.errstate(all="ignore"):
            array = np.array(lists, dtype)
            lost = np.isinf(array) & ~np.isinf(free) if dtype.kind in "fc" else array != free
    except (ValueError, TypeError, OverflowError, RecursionError) as problem:
        wanted = dtype.name if dtype is not None else "numbers"
        raise InvalidInput(f"input {name!r}: nested lists are not {wanted}: {problem}") from problem
    if lost.any():
        value = free[lost].item(0)
        raise InvalidInput(f"input {name!r}: nested lists hold {value}; expected {dtype.name}")
    return array


# --- requests ------------------------------------------------------------------------------------

_NO_CANVAS: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class RequestEncoder:
    """Builds one client's messages; what does not vary between requests is encoded once.

    `queue` is the Celery queue's name, `origin` shows in Celery's tools, `reply` is the client's
    reply channel.
    """

    def __init__(self, queue: str, origin: str, reply: str | None) -> None:
        head = json.dumps(
            {"content-encoding": "binary", "content-type": MSGPACK}, separators=(",", ":")
        )
        fixed: dict[str, Any] = {
            "lang": "py", "task": "inferq.infer", "shadow": None, "eta": None, "expires": None,
            "group": None, "group_index": None, "retries": 0, "timelimit": [None, None],
            "parent_id": None, "argsrepr": "()", "origin": origin, "ignore_result": False,
            "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
            "inferq_reply": reply,
        }  # fmt: skip
        properties = {
            "reply_to": "", "delivery_mode": 2, "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
        }  # fmt: skip
        self._head = head[:-1].encode() + b',"headers":' + json.dumps(fixed)[:-1].encode()
        self._middle = b'},"properties":' + json.dumps(properties)[:-1].encode()

    def encode(
        self,
        request_id: str,
        model: str,
        inputs: Mapping[str, Mapping[str, Any]],
        *,
        shown: str,
        priority: int,
        sent_ms: float,
        deadline_ms: float | None,
    ) -> bytes:
        """One message. `inputs` maps names to tensors' wire form; `shown` is their short repr.

        `request_id` must need no JSON escapes (a UUID); the times are Redis milliseconds.
        """
        body = _pack(([], {"model": model, "inputs": inputs}, _NO_CANVAS))
        deadline = "null" if deadline_ms is None else f"{deadline_ms:.3f}"
        headers = (
            f',"id":"{request_id}","root_id":"{request_id}","kwargsrepr":{json.dumps(shown)},'
            f'"inferq_sent_ms":{sent_ms:.3f},"inferq_deadline_ms":{deadline}'
        )
        tail = (
            f',"correlation_id":"{request_id}","delivery_tag":"{request_id}",'
            f'"priority":{priority}}},"body":"'
        )
        return b"".join(
            (
                self._head, headers.encode(), self._middle, tail.encode(),
                pybase64.b64encode(body), b'"}',
            )
        )  # fmt: skip


def shown(model: str, inputs: Tensors) -> str:
    """A request's short repr, for Flower and ``celery inspect``."""
    parts = ", ".join(f"{name}={describe(array)}" for name, array in inputs.items())
    return f"{{'model': '{model}', {parts}}}"


# --- results -------------------------------------------------------------------------------------


def encode_success(
    request_id: str,
    outputs: Tensors,
    receipt: Mapping[str, Any],
    date_done: str,
    content_type: str = MSGPACK,
    *,
    lists: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """A SUCCESS meta as Celery's Redis backend writes it; ``result`` maps outputs to tensors."""
    result: dict[str, Any]
    if content_type == MSGPACK:
        result = {name: encode_tensor(array) for name, array in outputs.items()}
    else:
        result = {
            name: {
                "dtype": array.dtype.str,
                "shape": array.shape,
                "data": _json_data(array, lists),
            }
            for name, array in outputs.items()
        }
    return encode_meta("SUCCESS", request_id, result, date_done, content_type, receipt, extra)


def _json_data(array: Array, lists: bool) -> object:
    """Nested lists if wanted; JSON has no complex numbers, so theirs are bytes in any case."""
    if lists and array.dtype.kind != "c":
        return array.tolist()
    return pybase64.b64encode_as_string(array.tobytes())


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
            return _pack(meta)
        except (ValueError, OverflowError) as problem:
            raise PayloadTooLarge(f"the result does not fit a message: {problem}") from problem
    return json.dumps(meta, separators=(",", ":")).encode()


def decode_meta(data: bytes) -> dict[str, Any]:
    """A result meta from either serialiser. MalformedMessage if it is neither."""
    try:
        meta = _from_json(data) if data[:1] == b"{" else _unpack(data)
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


def _odd(shape: tuple[int, ...]) -> bool:
    return len(shape) > MAX_DIMS or min(shape, default=0) < 0


_meta_decoder = msgspec.msgpack.Decoder(_WireMeta)
_outputs_decoder = msgspec.msgpack.Decoder(dict[str, _WireTensor])


def decode_success(data: bytes) -> tuple[dict[str, Array], Receipt | None] | None:
    """Outputs and receipt of a msgpack SUCCESS meta, without copying the tensors out of `data`.

    None for anything else, whatever is wrong with it: `decode_meta` and `decode_outputs` tell.
    """
    try:
        meta = _meta_decoder.decode(data)
        if meta.status != "SUCCESS":
            return None
        tensors = _outputs_decoder.decode(meta.result)
        if len(tensors) > MAX_TENSORS or any(_odd(t.shape) for t in tensors.values()):
            return None
        outputs = {
            name: np.frombuffer(tensor.data, WIRE_DTYPES[tensor.dtype]).reshape(tensor.shape)
            for name, tensor in tensors.items()
            if tensor.data.nbytes
        }
    except (msgspec.DecodeError, ValueError, KeyError):
        return None
    return (outputs, meta.receipt) if len(outputs) == len(tensors) else None


# --- announcements -------------------------------------------------------------------------------

_advert_decoder = msgspec.msgpack.Decoder(ModelAdvert)
encode_advert: Callable[[ModelAdvert], bytes] = msgspec.msgpack.Encoder().encode


def decode_advert(data: bytes) -> ModelAdvert:
    """What a worker announced. ConfigError if another version wrote it."""
    try:
        return _advert_decoder.decode(data)
    except msgspec.DecodeError as problem:
        raise ConfigError(f"a model's announcement cannot be read: {problem}") from problem
