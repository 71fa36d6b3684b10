"""When does a batch leave, and who is in it? A pure function: state in, decision out.

The rule is Triton's dynamic batcher's, with two additions: no request is split or starved (see
`MAX_OVERTAKES`), and where lanes run truly in parallel waiting requests are spread over the free
ones, since a full batch on one core beside an idle core helps nobody.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

#: How many smaller requests may overtake one that did not fit, before batches close at it.
MAX_OVERTAKES: Final = 8


class Candidate(Protocol):
    """What the policy sees of a waiting request."""

    @property
    def rows(self) -> int: ...
    @property
    def compatible(self) -> Hashable:
        """Requests that may share a batch have equal values."""

    @property
    def alone(self) -> bool:
        """It must not share a batch: a worker died computing it."""

    @property
    def arrived_ms(self) -> float: ...
    @property
    def overtaken(self) -> int: ...


@dataclass(frozen=True)
class Knobs:
    """The model's batching knobs; sizes in rows."""

    max_batch_size: int
    #: Ascending; empty: max_batch_size is the one to aim at.
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_ms: float = 0.0
    #: Ascending; empty: any size runs as it is.
    buckets: tuple[int, ...] = ()
    batchable: bool = True
    #: Lanes have hardware of their own (CPU cores): spread waiting requests over the free ones.
    spread: bool = False

    @property
    def target(self) -> int:
        """The batch size that is aimed at."""
        return self.preferred_batch_sizes[-1] if self.preferred_batch_sizes else self.max_batch_size

    def bucket(self, rows: int) -> int:
        """The size that a batch of `rows` runs at."""
        return next((size for size in self.buckets if size >= rows), rows)


@dataclass(frozen=True)
class Leave:
    """This batch leaves now: indices into the waiting requests, in order."""

    take: tuple[int, ...]
    rows: int
    bucket: int
    #: Index of the request that closed the batch and was overtaken by later ones, and how often.
    overtaken: int | None = None
    overtakes: int = 0


@dataclass(frozen=True)
class Wait:
    """Nothing leaves before `until_ms`, unless a request arrives."""

    until_ms: float


def decide(
    waiting: Sequence[Candidate], free_lanes: int, now_ms: float, knobs: Knobs
) -> Leave | Wait | None:
    """The next batch of `waiting` (most urgent first), given `free_lanes`; None: nothing to do."""
    if not waiting or not free_lanes:
        return None
    head = waiting[0]
    if head.alone or not knobs.batchable:
        return Leave((0,), head.rows, knobs.bucket(head.rows))
    limit = max(knobs.target, head.rows)
    if knobs.spread and free_lanes > 1:
        limit = min(limit, max(_share(waiting, head, free_lanes, limit), head.rows))
    take, rows, oldest = [0], head.rows, head.arrived_ms
    blocked: int | None = None
    overtakes = 0
    for index in range(1, len(waiting)):
        if rows >= limit:
            break
        item = waiting[index]
        if item.alone or item.compatible != head.compatible:
            continue
        if rows + item.rows > limit:
            if blocked is None:
                blocked = index
            continue
        if blocked is not None:
            if waiting[blocked].overtaken + overtakes >= MAX_OVERTAKES:
                break
            overtakes += 1
        take.append(index)
        rows += item.rows
        oldest = min(oldest, item.arrived_ms)
    due = oldest + knobs.max_queue_delay_ms
    if rows >= limit or blocked is not None or now_ms >= due:
        return Leave(tuple(take), rows, knobs.bucket(rows), blocked, overtakes)
    total = 0
    best: tuple[int, int] | None = None
    for count, index in enumerate(take, start=1):
        total += waiting[index].rows
        if total in knobs.preferred_batch_sizes:
            best = (count, total)
    if best is not None:
        return Leave(tuple(take[: best[0]]), best[1], knobs.bucket(best[1]))
    return Wait(due)


def _share(waiting: Sequence[Candidate], head: Candidate, free_lanes: int, limit: int) -> int:
    rows = 0
    for item in waiting:
        if not item.alone and item.compatible == head.compatible:
            rows += item.rows
            if rows >= limit * free_lanes:
                return limit
    return -(-rows // free_lanes)
