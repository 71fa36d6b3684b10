"""Encodes how requests ended: as result metas with receipts, or as dead letters."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgpack
from msgspec.structs import replace

from inferq.shared import codec
from inferq.shared.errors import (
    DeadLettered,
    EngineError,
    InferqError,
    PayloadTooLarge,
    from_wire,
)
from inferq.shared.schema import Ticket
from inferq.workers.batching.padding import Padding
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.recovery import linking_field
from inferq.workers.claims.runs import Outcome, Run
from inferq.workers.claims.settlement import DEAD_LETTER, FAILURE, REVOKED, SUCCESS, Settlement
from inferq.workers.claims.verdicts import Failed, Quarantined, Revoked
from inferq.workers.logs.fields import about
from inferq.workers.models.batch_layout import moved_back

logger = logging.getLogger(__name__)

#: Most bytes of its message in a dead letter. Redis takes no value much larger than the largest
#: message, and closes the connection on one.
MAX_LETTER_BYTES: Final = 256 * 1024 * 1024
#: Most bytes kept of a message that no worker can read, and most characters of the reason.
MAX_QUARANTINED_BYTES: Final = 64 * 1024
MAX_REASON_CHARS: Final = 500


def _now() -> str:
    return _iso(int(time.time() * 100))


@lru_cache(maxsize=1)
def _iso(hundredths: int) -> str:
    """`date_done`, made once per batch rather than once per request."""
    return datetime.fromtimestamp(hundredths / 100, UTC).isoformat()


def _is_final(result: bytes) -> bool:
    """Whether nobody will send the request of this stored result again."""
    try:
        meta = codec.decode_meta(result)
    except codec.MalformedMessage:
        return False
    status = meta["status"]
    return status == "SUCCESS" or not isinstance(
        from_wire(status, meta.get("result")), DeadLettered
    )


def _short(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON_CHARS else reason[:MAX_REASON_CHARS] + "…"


@dataclass(frozen=True)
class Results:
    """Makes Settlements of one model's requests."""

    worker: str
    engine: str
    version: int
    padding: Padding
    #: Output → the dim that its rows are, where that is not dim 0.
    axes: Mapping[str, int] = field(default_factory=dict)
    #: See `Settings.json_nan`.
    nan: str = "bare"

    def computed(self, outcome: Outcome) -> Settlement:
        """The settlement of a request that was computed, or failed being computed."""
        item = outcome.item
        ticket = item.ticket
        if outcome.outputs is None or outcome.run is None:
            error = outcome.error or InferqError("the engine gave no outcome")
            return self.failed(item.slot, ticket, error, running=True)
        try:
            outputs = self.padding.cut(outcome.outputs, item.padded)
            if item.outputs is not None:
                outputs = {name: outputs[name] for name in item.outputs}
            if self.axes:
                outputs = moved_back(outputs, self.axes)
            meta = codec.encode_success(
                ticket.id,
                outputs,
                self._receipt(outcome),
                _now(),
                ticket.content_type,
                lists=ticket.lists,
                extra=ticket.extra,
                nan=self.nan,
            )
        except PayloadTooLarge as too_large:
            return self.failed(item.slot, ticket, too_large, running=True, run=outcome.run)
        except Exception as problem:
            told = about(ticket.id, model=ticket.model)
            logger.exception("the result of %s cannot be encoded", ticket.id, extra=told)
            broken = EngineError(f"its result cannot be encoded: {problem!r}")
            return self.failed(item.slot, ticket, broken, running=True, run=outcome.run)
        if len(meta) > codec.MAX_MESSAGE_BYTES:
            limit = codec.MAX_MESSAGE_BYTES
            error = PayloadTooLarge(f"the result is {len(meta)} bytes; expected at most {limit}")
            return self.failed(item.slot, ticket, error, running=True, run=outcome.run)
        return self._settlement(
            item.slot, ticket, meta, running=True, ending=SUCCESS, run=outcome.run
        )

    def failed(
        self,
        slot: Slot,
        ticket: Ticket,
        error: InferqError,
        *,
        running: bool = False,
        run: Run | None = None,
    ) -> Settlement:
        """FAILURE with `error`. `run`: the run, if it was computed all the same."""
        meta = codec.encode_failure(
            ticket.id, error, _now(), ticket.content_type, extra=ticket.extra
        )
        return self._settlement(
            slot,
            ticket,
            meta,
            running=running,
            ending=FAILURE,
            ended=Failed(slot, ticket, error),
            run=run,
        )

    def revoked(
        self, slot: Slot, ticket: Ticket, reason: str, *, running: bool = False
    ) -> Settlement:
        """REVOKED; `reason`: revoked or expired."""
        meta = codec.encode_revoked(ticket.id, reason, _now(), ticket.content_type)
        ended = Revoked(slot, ticket, reason)
        return self._settlement(slot, ticket, meta, running=running, ending=REVOKED, ended=ended)

    def answered(self, slot: Slot, ticket: Ticket, result: bytes) -> Settlement:
        """The settlement that only acknowledges it and forgets its attempts.

        `result`: its stored result, if it has links or payloads. A dead letter still needs its
        payloads.
        """
        return Settlement(
            slot,
            ticket.model,
            ticket.id,
            result if ticket.canvas else b"",
            ignore_result=True,
            attempts=1,
            stored=True,
            payload_keys=ticket.payload_keys if _is_final(result) else (),
        )

    def late(self, found: Failed | Revoked) -> Settlement:
        """The settlement of a request that was too late to be computed."""
        if isinstance(found, Failed):
            return self.failed(found.slot, found.ticket, found.error, running=True)
        return self.revoked(found.slot, found.ticket, found.reason, running=True)

    def dead(self, slot: Slot, ticket: Ticket, message: bytes, redis_ms: float) -> Settlement:
        """A dead letter: computing it ended its worker too often. Its payload is kept."""
        reason = f"its worker died computing it {ticket.attempts} times"
        return self._dead(slot, ticket, message, reason, redis_ms)

    def unlinkable(self, slot: Slot, ticket: Ticket, message: bytes, redis_ms: float) -> Settlement:
        """A dead letter: publishing the tasks that follow it ended its worker too often."""
        reason = f"its worker died publishing what follows on it {ticket.attempts} times"
        done = self._dead(slot, ticket, message, reason, redis_ms)
        return replace(done, attempts_field=linking_field(ticket.id))

    def undecodable(
        self, slot: Slot, message: bytes, attempts_field: str, deaths: int, redis_ms: float
    ) -> Settlement:
        """A dead letter: decoding it ended its worker too often.

        `attempts_field`: see Settlement.
        """
        reason = f"its worker died decoding it {deaths} times"
        ticket = codec.guess_ticket(message, slot.claim.model)
        if ticket is None:
            done = self.quarantined(Quarantined(slot, message, reason), redis_ms, deaths)
        else:
            ticket = replace(ticket, attempts=deaths)
            done = self._dead(slot, ticket, message, reason, redis_ms)
        return replace(done, attempts_field=attempts_field)

    def quarantined(self, found: Quarantined, redis_ms: float, attempts: int = 0) -> Settlement:
        """A dead letter: nobody can read it. It is answered if it is an envelope with an id."""
        model = found.slot.claim.model
        ticket = codec.guess_ticket(found.message, model)
        if ticket is None:
            letter = self._quarantined(None, found, redis_ms, attempts)
            return Settlement(
                found.slot,
                model,
                None,
                b"",
                dead_letter=letter,
                quarantined=True,
                ending=DEAD_LETTER,
            )
        letter = self._quarantined(ticket.id, found, redis_ms, attempts)
        return replace(
            self._given_up(
                found.slot, replace(ticket, attempts=attempts), letter, _short(found.reason)
            ),
            quarantined=True,
        )

    def _dead(
        self, slot: Slot, ticket: Ticket, message: bytes, reason: str, redis_ms: float
    ) -> Settlement:
        letter = self._letter(ticket.id, message, reason, redis_ms, ticket.attempts)
        return self._given_up(slot, ticket, letter, reason)

    def _given_up(self, slot: Slot, ticket: Ticket, letter: bytes, reason: str) -> Settlement:
        error = DeadLettered(reason, attempts=ticket.attempts, reason=reason)
        meta = codec.encode_failure(
            ticket.id, error, _now(), ticket.content_type, extra=ticket.extra
        )
        ended = Failed(slot, ticket, error)
        return self._settlement(
            slot, ticket, meta, dead_letter=letter, ending=DEAD_LETTER, ended=ended
        )

    def _quarantined(
        self, request_id: str | None, found: Quarantined, redis_ms: float, attempts: int
    ) -> bytes:
        """The letter begins with QUARANTINED_MARK, by which letters.lua recognises it."""
        return self._letter(
            request_id,
            found.message,
            _short(found.reason),
            redis_ms,
            attempts,
            most=min(MAX_QUARANTINED_BYTES, MAX_LETTER_BYTES),
            quarantined=True,
        )

    def _letter(
        self,
        request_id: str | None,
        message: bytes,
        reason: str,
        redis_ms: float,
        attempts: int,
        *,
        most: int = MAX_LETTER_BYTES,
        **first: bool,
    ) -> bytes:
        letter: bytes = msgpack.packb(
            {
                **first,
                "id": request_id,
                "reason": reason,
                "attempts": attempts,
                "at_ms": redis_ms,
                "worker": self.worker,
                "size": len(message),
                "message": message[:most],
            }
        )
        return letter

    def _settlement(
        self,
        slot: Slot,
        ticket: Ticket,
        meta: bytes,
        *,
        ending: str,
        running: bool = False,
        dead_letter: bytes | None = None,
        ended: Failed | Revoked | None = None,
        run: Run | None = None,
    ) -> Settlement:
        return Settlement(
            slot=slot,
            model=ticket.model,
            request_id=ticket.id,
            outcome=meta,
            ignore_result=ticket.ignore_result,
            reply=ticket.reply,
            running=running,
            attempts=ticket.attempts,
            payload_keys=ticket.payload_keys,
            dead_letter=dead_letter,
            ending=ending,
            ended=ended,
            sent_ms=ticket.sent_ms,
            run=run,
        )

    def _receipt(self, outcome: Outcome) -> Mapping[str, Any]:
        item, run = outcome.item, outcome.run
        ticket = item.ticket
        if run is None:
            raise ValueError("only a computed request has a receipt")
        queued = (
            None
            if ticket.sent_ms is None
            else max(0.0, round(item.claimed_redis_ms - ticket.sent_ms, 3))
        )
        gpu = run.gpu
        on_gpu = (
            {}
            if gpu is None
            else {
                "gpu_h2d_ms": round(gpu.h2d_ms, 3),
                "gpu_compute_ms": round(gpu.compute_ms, 3),
                "gpu_d2h_ms": round(gpu.d2h_ms, 3),
            }
        )
        return {
            "queue_ms": queued,
            "form_ms": round(run.started_mono_ms - item.arrived_mono_ms, 3),
            "compute_ms": round(run.ended_mono_ms - run.started_mono_ms, 3),
            "settle_ms": round(time.monotonic() * 1000 - run.ended_mono_ms, 3),
            "batch_size": run.rows,
            "padding": run.padding,
            "requests": run.requests,
            "worker": self.worker,
            "engine": self.engine,
            "model": ticket.model,
            "version": self.version,
            "attempt": ticket.attempts + 1,
            **on_gpu,
        }
