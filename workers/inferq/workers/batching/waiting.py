"""One model's decoded requests that wait for a lane, most urgent first."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import msgspec

from inferq.shared.schema import Tensors, Ticket
from inferq.workers.batching.policy import Leave

_sequence = count()


class Waiting(msgspec.Struct, eq=False):
    """A decoded request and its place. A policy.Candidate."""

    ticket: Ticket
    inputs: Tensors
    #: Its place in a claim; opaque here.
    slot: Any
    compatible: Hashable
    arrived_mono_ms: float
    claimed_redis_ms: float
    rows: int
    alone: bool
    overtaken: int = 0
    #: Sizes before padding of the dims that were padded: symbol → size.
    padded: Mapping[str, int] | None = None
    #: Optional inputs that it gives; None: none. Those it is compatible with give the same.
    shared: Tensors | None = None
    #: The names of the outputs that it wants; None: all.
    outputs: tuple[str, ...] | None = None
    order: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.order = (self.ticket.priority, next(_sequence))


class WaitingRequests:
    """A list kept in order of urgency, then arrival. Owned by the data plane's thread."""

    def __init__(self) -> None:
        self._items: list[Waiting] = []
        #: Priority → rows that wait with it.
        self.rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> Sequence[Waiting]:
        return self._items

    def add(self, item: Waiting) -> None:
        """Put `item` behind all that are as urgent as it."""
        priority = item.ticket.priority
        self.rows[priority] = self.rows.get(priority, 0) + item.rows
        if not self._items or self._items[-1].order < item.order:
            self._items.append(item)
        else:
            insort(self._items, item, key=lambda waiting: waiting.order)

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
        for item in taken:
            self.rows[item.ticket.priority] -= item.rows
        return taken

    def clear(self) -> None:
        self._items.clear()
        self.rows.clear()


def rows_by_priority(items: Iterable[Waiting]) -> dict[int, int]:
    """Priority → rows of the `items` that have it."""
    rows: dict[int, int] = {}
    for item in items:
        rows[item.ticket.priority] = rows.get(item.ticket.priority, 0) + item.rows
    return rows
