"""Hop 7. From a stored result to arrays and a receipt, or to the error that it stands for."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from inferq.producer.pending import Outcome, PendingRequest, Result
from inferq.shared import codec
from inferq.shared.errors import EngineError, InferqError, InvalidInput, from_wire
from inferq.shared.schema import Array, Receipt

_TERMINAL: Final = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


def outcome_of(pending: PendingRequest, raw: bytes) -> Outcome | None:
    """What a result meta stands for; None if it is not terminal."""
    read = codec.decode_success(raw) or _read_slowly(pending, raw)
    if not isinstance(read, tuple):
        return read
    outputs, receipt = read
    latency_ms = (time.monotonic() - pending.submitted_at) * 1000
    return Result(outputs, receipt, pending.request_id, latency_ms)


def _read_slowly(
    pending: PendingRequest, raw: bytes
) -> tuple[dict[str, Array], Receipt | None] | InferqError | None:
    try:
        meta = codec.decode_meta(raw)
        status = meta["status"]
        if status not in _TERMINAL:
            return None
        if status != "SUCCESS":
            return from_wire(status, meta.get("result"))
        outputs = codec.decode_outputs(meta.get("result"))
    except (codec.MalformedMessage, InvalidInput) as problem:
        return EngineError(f"request {pending.request_id}: unreadable result: {problem}")
    try:
        return outputs, msgspec.convert(meta.get("receipt"), Receipt)
    except msgspec.ValidationError:
        return outputs, None
