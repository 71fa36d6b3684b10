"""Reads a dead letter: who asked, what it needs, and how its request is sent again."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Final

import msgspec

from inferq.shared import codec
from inferq.shared.errors import InvalidInput
from inferq.shared.names import HEADER_DEADLINE_MS, Names
from inferq.workers.claims.message import arguments, references_in, unix_ms


class _Stored(msgspec.Struct, frozen=True):
    """A letter as results.py writes it."""

    id: str | None
    reason: str
    attempts: int
    at_ms: Annotated[float, msgspec.Meta(ge=0, le=1e14)]
    worker: str
    message: bytes
    size: int = 0


class Letter(msgspec.Struct, frozen=True):
    """One entry of dead:<model>; `raw` are its bytes there, `message` those of the request.

    `at_ms`: Redis ms. `id`: None where the message names no request.
    """

    model: str
    raw: bytes
    id: str | None
    reason: str
    attempts: int
    at_ms: float
    worker: str
    message: bytes
    #: Bytes of the request. Messages that nobody can read are not kept whole.
    size: int
    #: False for an entry of the list that is no dead letter.
    genuine: bool = True

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return self.id or f"#{hashlib.sha1(self.message, usedforsecurity=False).hexdigest()[:12]}"

    @property
    def is_cut(self) -> bool:
        """Whether `message` is only the beginning of the request."""
        return self.size > len(self.message)

    @property
    def digest(self) -> bytes:
        return hashlib.sha1(self.raw, usedforsecurity=False).digest()


class Again(msgspec.Struct, frozen=True):
    """A request as it is sent again; `dropped`: headers that have expired."""

    message: bytes
    dropped: list[str]
    #: Redis ms; None: it has none that is ahead.
    deadline_ms: float | None


class _Loose(msgspec.Struct):
    """The parts of a broken envelope that can be read."""

    headers: Any = None
    properties: Any = None


_decoder: Final = msgspec.msgpack.Decoder(_Stored)


def read_letter(model: str, raw: bytes) -> Letter:
    """Read one entry of dead:<model>. Never raises."""
    try:
        stored = _decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        reason = f"not a dead letter: {problem}"
        return Letter(model, raw, None, reason, 0, 0.0, "", raw, len(raw), genuine=False)
    return Letter(
        model,
        raw,
        stored.id,
        stored.reason,
        stored.attempts,
        stored.at_ms,
        stored.worker,
        stored.message,
        max(stored.size, len(stored.message)),
    )


def headers_in(message: bytes) -> dict[str, Any]:
    """All headers, even if a worker cannot read the message; empty if there are none."""
    headers = _loose(message).headers
    return headers if isinstance(headers, dict) else {}


def priority_in(message: bytes) -> int:
    """The priority as kombu reads it: 0 to 9, 0 if there is none."""
    properties = _loose(message).properties
    priority = properties.get("priority") if isinstance(properties, dict) else None
    return max(0, min(9, priority)) if isinstance(priority, int) else 0


def problem_with(letter: Letter) -> str | None:
    """Why no worker can read it; None if its envelope is sound."""
    if not letter.genuine or letter.is_cut:
        return letter.reason
    try:
        codec.decode_envelope(letter.message)
    except codec.MalformedMessage as malformed:
        return str(malformed)
    return None


def payloads_in(message: bytes, names: Names) -> dict[str, str]:
    """Input name → key of the request's own claim-checked tensors; empty if it cannot be read."""
    try:
        envelope = codec.decode_envelope(message)
        given = arguments(codec.decode_body(envelope))
    except (codec.MalformedMessage, InvalidInput):
        return {}
    references = references_in(given.get("inputs"))
    request_id = envelope.headers.id
    return {name: key for name, key in references.items() if names.is_payload_of(key, request_id)}


def in_time(message: bytes, now_ms: float) -> Again:
    """The message without an expired deadline or `expires`, which would end it at once.

    All else keeps its bytes. A message that cannot be read is left as it is.
    """
    try:
        headers = codec.decode_envelope(message).headers
        expires_ms = unix_ms("expires", headers.expires) if headers.expires else None
    except codec.MalformedMessage:
        return Again(message, [], None)
    except InvalidInput:  # it is no time: the worker reports that
        expires_ms = None
    ends = {HEADER_DEADLINE_MS: headers.inferq_deadline_ms, "expires": expires_ms}
    passed = [header for header, ms in ends.items() if ms is not None and ms <= now_ms]
    ahead = [ms for ms in ends.values() if ms is not None and ms > now_ms]
    if passed:
        parts = msgspec.json.decode(message, type=dict[str, msgspec.Raw])
        kept = msgspec.json.decode(parts["headers"], type=dict[str, msgspec.Raw])
        kept.update((header, msgspec.Raw(b"null")) for header in passed)
        parts["headers"] = msgspec.Raw(msgspec.json.encode(kept))
        message = msgspec.json.encode(parts)
    return Again(message, passed, max(ahead, default=None))


def _loose(message: bytes) -> _Loose:
    try:
        return msgspec.json.decode(message, type=_Loose)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Loose()
