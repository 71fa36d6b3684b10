"""Hop 7. Turns a stored result into arrays and a receipt, or into the error that it stands for."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from inferq.producer.pending import Outcome, PendingRequest, Result
from inferq.shared import codec
from inferq.shared.errors import EngineError, InferqError, InvalidInput, from_wire
from inferq.shared.schema import Array, Receipt

#: Most bytes of a result that is no worker's success: decoded, it may take 40 times as much memory.
MAX_ODD_BYTES: Final = 8 * 1024 * 1024
_TERMINAL: Final = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


def outcome_of(pending: PendingRequest, raw: bytes) -> Outcome | None:
    """The outcome that a result meta stands for; None if it is not terminal. Never raises.

    Anybody who has the password may have stored it. What cannot be read fails this request alone.
    """
    try:
        read = codec.decode_success(raw) or _read_slowly(pending, raw)
    except Exception as problem:  # noqa: BLE001  the others' results are read all the same
        return _unreadable(pending, f"{type(problem).__name__}: {codec.brief(str(problem))}")
    if not isinstance(read, tuple):
        return read
    outputs, receipt = read
    latency_ms = (time.monotonic() - pending.submitted_at) * 1000
    return Result(outputs, receipt, pending.request_id, latency_ms, pending.labels)


def _read_slowly(
    pending: PendingRequest, raw: bytes
) -> tuple[dict[str, Array], Receipt | None] | InferqError | None:
    if len(raw) > MAX_ODD_BYTES:
        return _unreadable(
            pending,
            f"{len(raw)} bytes that are no tensors in msgpack; expected at most {MAX_ODD_BYTES}",
        )
    try:
        meta = codec.decode_meta(raw)
        status = meta["status"]
        if status not in _TERMINAL:
            return None
        if status != "SUCCESS":
            return from_wire(status, meta.get("result"))
        outputs = codec.decode_outputs(meta.get("result"))
    except (codec.MalformedMessage, InvalidInput) as problem:
        return _unreadable(pending, str(problem))
    try:
        return outputs, msgspec.convert(meta.get("receipt"), Receipt)
    except msgspec.ValidationError:
        return outputs, None


def _unreadable(pending: PendingRequest, why: str) -> EngineError:
    return EngineError(f"request {pending.request_id}: unreadable result: {why}")
