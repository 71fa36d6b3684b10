"""Requests: Celery's message protocol v2 in kombu's Redis envelope.

https://docs.celeryq.dev/en/stable/internals/protocol.html describes the message; kombu's virtual
transports wrap it in a JSON envelope whose body is base64.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import pybase64

from inferq.shared.codec.content import (
    JSON,
    MSGPACK,
    MalformedMessage,
    brief,
    from_json,
    pack,
    unpack,
)
from inferq.shared.errors import InvalidInput
from inferq.shared.schema import Tensors, Ticket, describe

#: Most bytes of one message on the queue; a longer one is quarantined unread.
MAX_MESSAGE_BYTES: Final = 512 * 1024 * 1024
#: Most bytes of it besides the body: headers and properties.
MAX_HEAD_BYTES: Final = 1024 * 1024
#: Most characters of an id, or of a reply channel: results and keys contain them.
MAX_ID_CHARS: Final = 1_000

Id = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]


class Headers(msgspec.Struct):
    """The message headers that the fast path reads; Celery sends more."""

    id: Id
    task: str
    eta: str | None = None
    expires: str | None = None
    retries: int | None = 0
    ignore_result: bool | None = False
    group: Id | None = None
    root_id: Id | None = None
    parent_id: Id | None = None
    kwargsrepr: str | None = None
    compression: str | None = None
    inferq_reply: Id | None = None
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


class _NamedHeaders(msgspec.Struct):
    id: Id


class _Named(msgspec.Struct):
    """The fields of an envelope that say who asked; nothing else of it is decoded."""

    headers: _NamedHeaders
    content_type: msgspec.Raw = msgspec.field(name="content-type", default=msgspec.Raw())


#: Of a request's short repr: inputs, and characters of the name of one.
_SHOWN: Final = 16
_SHOWN_CHARS: Final = 60

#: Longer messages are not given to Python's JSON, which decodes all of a message.
_PYTHON_BYTES: Final = 64 * 1024
#: Ids as clients make them. In a broken message no others are looked for.
_PLAIN_ID: Final = re.compile(r"[ !#-\[\]-~]{1,200}")

_envelope_decoder = msgspec.json.Decoder(Envelope)
_named_decoder = msgspec.json.Decoder(_Named)
_STR: Final = frozenset({str})
_NO_CANVAS: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Body(msgspec.Struct, frozen=True):
    """A decoded body: the task's arguments and Celery's embedded canvas."""

    args: list[Any]
    kwargs: dict[str, Any]
    embed: dict[str, Any]

    @property
    def has_canvas(self) -> bool:
        """Whether other tasks follow this request: links, a chain, a chord."""
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
    """Who sent an envelope that is refused for another reason; None: it does not say.

    It must be sound JSON with the id where it belongs. Bytes that are no envelope and merely
    contain some id are no reason to tell that client that its request failed.
    """
    named: _Named | None
    try:
        named = _named_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        named = _named_by_python(raw)
    if named is None or _PLAIN_ID.fullmatch(named.headers.id) is None:
        return None
    kind = MSGPACK if bytes(named.content_type) == b'"%s"' % MSGPACK.encode() else JSON
    return Ticket(id=named.headers.id, model=model, content_type=kind)


def _named_by_python(raw: bytes) -> _Named | None:
    """Decode what Celery writes and only Python's JSON reads: NaN, Infinity."""
    if len(raw) > _PYTHON_BYTES:
        return None
    try:
        tree = json.loads(raw.decode())
        kind = json.dumps(tree.get("content-type")).encode()
        return _Named(msgspec.convert(tree.get("headers"), _NamedHeaders), msgspec.Raw(kind))
    except (ValueError, RecursionError, AttributeError):
        return None


def decode_body(envelope: Envelope) -> Body:
    """Read an envelope's body. InvalidInput if it is not ``[args, kwargs, embed]``."""
    kind = envelope.content_type
    try:
        data = _body_bytes(envelope)
        if kind == MSGPACK:
            body = unpack(data)
        elif kind == JSON:
            body = from_json(data)
        else:
            raise InvalidInput(f"content type {brief(kind)}; expected {MSGPACK} or {JSON}")
    except (ValueError, msgspec.DecodeError, RecursionError) as problem:
        raise InvalidInput(f"the message body cannot be read as {kind}: {problem}") from problem
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


def _body_bytes(envelope: Envelope) -> bytes:
    text = memoryview(envelope.body)
    if len(text) < 2 or text[0] != 0x22:
        raise InvalidInput("the message body is not a string")
    if envelope.properties.body_encoding != "base64":
        return bytes(msgspec.json.decode(envelope.body).encode())
    try:
        plain: bytes = pybase64.b64decode(text[1:-1], validate=True)
        return plain
    except (binascii.Error, ValueError):
        pass
    try:  # escaped slashes: the slow way
        plain = pybase64.b64decode(msgspec.json.decode(envelope.body), validate=True)
        return plain
    except (binascii.Error, ValueError) as problem:
        raise InvalidInput(f"the message body is not base64: {problem}") from problem


class RequestEncoder:
    """Builds one client's messages; what is the same in all of them is encoded once.

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
            "reply_to": "",
            "delivery_mode": 2,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
        }
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
        outputs: Sequence[str] | None = None,
    ) -> bytes:
        """One message. `inputs` maps names to tensors' wire form; `shown` is their short repr.

        `outputs`: the names of those that are wanted; None: all are.
        `request_id` must need no JSON escapes (a UUID); the times are Redis milliseconds.
        """
        kwargs: dict[str, Any] = {"model": model, "inputs": inputs}
        if outputs is not None:
            kwargs["outputs"] = outputs
        body = pack(([], kwargs, _NO_CANVAS))
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
                self._head,
                headers.encode(),
                self._middle,
                tail.encode(),
                pybase64.b64encode(body),
                b'"}',
            )
        )


def shown(model: str, inputs: Tensors) -> str:
    """A request's short repr, for Flower and ``celery inspect``."""
    shown = [f"{name[:_SHOWN_CHARS]}={describe(inputs[name])}" for name in [*inputs][:_SHOWN]]
    if len(inputs) > _SHOWN:
        shown.append(f"… {len(inputs) - _SHOWN} more")
    return f"{{'model': '{model}', {', '.join(shown)}}}"
