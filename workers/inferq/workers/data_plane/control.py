"""What the data plane asks of the control plane: what only Celery's half can do."""

from __future__ import annotations

from typing import Protocol

from inferq.workers.claims.claim import Slot
from inferq.workers.claims.settlement import Settlement


class Control(Protocol):
    """The data plane's thread calls all methods. They return at once."""

    def publish_canvas(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        """Publish the request's links, chain and chord, then call DataPlane.on_ready."""

    def hand_over(self, slot: Slot, model: str, message: bytes, handed: bytes) -> Settlement:
        """The settlement that moves a message to kombu's unacked, as `handed`, or makes it wait."""
        ...

    def end_process(self) -> None:
        """End the process: an engine cannot be used again, or the data plane failed.

        The log says which.
        """
