"""What the data plane asks of the process around it: the seam to Celery's side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.settlement import Settlement


class Hooks(Protocol):
    """All are called from the data plane's thread and return at once."""

    def publish_canvas(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        """Publish the request's links, chain and chord, then call DataPlane.on_ready."""

    def hand_over(self, slot: Slot, model: str, message: bytes, handed: bytes) -> Settlement:
        """The settlement that moves a message, as `handed`, into kombu's care; or has it wait."""
        ...

    def keep(self, slot: Slot, message: bytes, due_ms: float) -> Settlement:
        """The settlement that has a request wait until `due_ms` (Redis ms), and then return."""
        ...

    def on_admitted(self, items: Sequence[Waiting]) -> None:
        """These were claimed and wait for a lane."""

    def on_settled(self, settlements: Sequence[Settlement]) -> None:
        """These were settled in one round trip."""

    def on_fatal(self, reason: str) -> None:
        """The process must end: an engine is beyond use, or the data plane failed."""
