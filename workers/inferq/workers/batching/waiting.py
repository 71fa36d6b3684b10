"""One model's decoded requests that wait for a lane, most urgent first."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Any

import msgspec

from inferq.shared.schema import Tensors, Ticket
from inferq.workers.batching.policy import Leave

_sequence = count()


class Waiting(msgspec.Struct, eq=False):
    """A decoded request and its place. A policy.Candidate; times in ms of the monotonic clock."""

    ticket: Ticket
    inputs: Tensors
    #: Its place in a claim; opaque here.
    slot: Any
    compatible: Hashable
    arrived_ms: float
    #: Redis ms when it was claimed.
    claimed_ms: float
    rows: int
    alone: bool
    overtaken: int = 0
    #: Sizes before padding of the dims that were padded: symbol → size.
    padded: Mapping[str, int] | None = None
    order: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.order = (self.ticket.priority, next(_sequence))


class WaitingRequests:
    """A list kept in order of urgency, then arrival. Owned by the data plane's thread."""

    def __init__(self) -> None:
        self._items: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> Sequence[Waiting]:
        return self._items

    def add(self, item: Waiting) -> None:
        """Put `item` behind all that are as urgent as it."""
        if not self._items or self._items[-1].order < item.order:
            self._items.append(item)
        else:
            insort(self._items, item, key=lambda waiting: waiting.order)

    def rows_ahead(self, priority: int) -> int:
        """Rows of all that a new request of `priority` would not overtake."""
        return sum(item.rows for item in self._items if item.ticket.priority <= priority)

    def take(self, leave: Leave) -> list[Waiting]:
        """Remove and return the requests of a decided batch."""
        for index, times in leave.overtaken.items():
            self._items[index].overtaken += times
        taken = [self._items[index] for index in leave.take]
        if leave.take == tuple(range(len(leave.take))):
            del self._items[: len(leave.take)]
        else:
            gone = set(leave.take)
            self._items = [item for i, item in enumerate(self._items) if i not in gone]
        return taken

    def clear(self) -> None:
        self._items.clear()
