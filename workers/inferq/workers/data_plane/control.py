"""What the data plane asks of the control plane: what Celery's half alone can do."""

from __future__ import annotations

from typing import Protocol

from inferq.workers.claims.claim import Slot
from inferq.workers.claims.settlement import Settlement


class Control(Protocol):
    """All are called from the data plane's thread and return at once."""

    def publish_canvas(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        """Publish the request's links, chain and chord, then call DataPlane.on_ready."""

    def hand_over(self, slot: Slot, model: str, message: bytes, handed: bytes) -> Settlement:
        """The settlement that moves a message, as `handed`, into kombu's care; or has it wait."""
        ...

    def end_process(self) -> None:
        """End it: an engine is beyond use, or the data plane failed. The log says which."""
