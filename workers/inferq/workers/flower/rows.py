"""The Broker page's rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from inferq.shared.names import queue_of
from inferq.workers.flower.readings import Reading
from inferq.workers.logs.printing import age
from inferq.workers.queues.depths import Depth


@dataclass(frozen=True, kw_only=True)
class Queue:
    """One queue. `depth`: its model's figures; None: the queue is no model's."""

    name: str
    messages: int
    depth: Depth | None = None

    @property
    def by_priority(self) -> str:
        """For example "0: 12, 9: 3"; empty if only the default priority waits."""
        split = self.depth.by_priority if self.depth else {}
        waiting = {step: count for step, count in split.items() if count}
        return ", ".join(f"{step}: {n}" for step, n in waiting.items()) if any(waiting) else ""

    @property
    def oldest(self) -> str | None:
        """How long the oldest request has waited."""
        seconds = self.depth.oldest_age_s if self.depth else None
        return None if seconds is None else age(seconds)

    @property
    def warning(self) -> str | None:
        """A warning for the operator."""
        if self.depth is None:
            return None
        if self.depth.depth and not self.depth.consumers:
            return "no worker consumes it"
        if self.depth.near_limit:
            return f"near its limit of {self.depth.max_queue_depth}"
        return None

    def as_json(self) -> Mapping[str, Any]:
        """Flower's keys first, then inferq's."""
        depth = self.depth
        if depth is None:
            return {"name": self.name, "messages": self.messages}
        return {
            "name": self.name,
            "messages": self.messages,
            "messages_ready": self.messages,
            "messages_unacknowledged": depth.claimed,
            "consumers": depth.consumers,
            "by_priority": {str(step): count for step, count in depth.by_priority.items()},
            "oldest_age_s": depth.oldest_age_s,
            "later": depth.later,
            "dead_letters": depth.dead,
            "limit": depth.max_queue_depth,
        }


def queues(reading: Reading, consumed: Collection[str]) -> list[Queue]:
    """All models' queues, then others that are `consumed` or hold messages."""
    ours = [
        Queue(name=queue_of(depth.model), messages=depth.depth, depth=depth)
        for depth in reading.depths.models
    ]
    others = [Queue(name=name, messages=n) for name, n in sorted(reading.foreign.items())]
    return ours + [queue for queue in others if queue.messages or queue.name in consumed]
