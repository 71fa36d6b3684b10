"""The results of reading a claimed message: a request that may join a batch, or how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from inferq.shared.errors import (
    InferqError,
)
from inferq.shared.schema import (
    Ticket,
)
from inferq.workers.claims.claim import Slot


class Opened(msgspec.Struct, frozen=True):
    """A request whose message was read, but not its tensors yet."""

    slot: Slot
    ticket: Ticket
    inputs: Mapping[str, Any]
    #: Input name → payload key of the claim-checked ones.
    references: Mapping[str, str]
    #: The names of the outputs that it wants; None: all.
    outputs: tuple[str, ...] | None = None


class Failed(msgspec.Struct, frozen=True):
    """It ends here, with `error`."""

    slot: Slot
    ticket: Ticket
    error: InferqError


class Revoked(msgspec.Struct, frozen=True):
    """It ends here as REVOKED; `reason`: revoked or expired."""

    slot: Slot
    ticket: Ticket
    reason: str


Known = TypeVar("Known", bound=Opened | Failed | Revoked)


def retried(found: Known, attempts: int) -> Known:
    """The same, after `attempts` workers died computing it."""
    return replace(found, ticket=replace(found.ticket, attempts=attempts))


class Foreign(msgspec.Struct, frozen=True):
    """A foreign task: Celery's own handler takes it over, as `handed`."""

    slot: Slot
    message: bytes
    handed: bytes


class ScheduledRequest(msgspec.Struct, frozen=True):
    """A valid request whose ETA, `due_ms` in Redis ms, is ahead."""

    slot: Slot
    message: bytes
    due_ms: float


class Quarantined(msgspec.Struct, frozen=True):
    """Bytes that are no request, as far as can be read."""

    slot: Slot
    message: bytes
    reason: str
