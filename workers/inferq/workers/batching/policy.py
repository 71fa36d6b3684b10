"""Decides when a batch leaves and which requests are in it.

A pure function: state in, decision out.

The rule is that of Triton's dynamic batcher, with two additions. No request is split or starved
(see `MAX_OVERTAKES`). Where lanes run in parallel on hardware of their own, waiting requests are
spread over the free lanes, since a full batch on one core beside an idle core is slower.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

#: Smaller requests that may overtake one that did not fit; then no batch takes any behind it.
MAX_OVERTAKES: Final = 8


class Candidate(Protocol):
    """A waiting request as the policy sees it."""

    @property
    def rows(self) -> int: ...
    @property
    def compatible(self) -> Hashable:
        """Requests that may share a batch have equal values."""

    @property
    def alone(self) -> bool:
        """It must run alone: a worker died computing it."""

    @property
    def arrived_mono_ms(self) -> float: ...
    @property
    def overtaken(self) -> int: ...


@dataclass(frozen=True)
class Knobs:
    """The model's batching knobs; sizes in rows."""

    max_batch_size: int
    #: Ascending; empty: max_batch_size is the target.
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_ms: float = 0.0
    #: Ascending; empty: any size runs as it is.
    buckets: tuple[int, ...] = ()
    batchable: bool = True
    #: Lanes have hardware of their own (CPU cores): waiting requests are spread over the free ones.
    spread: bool = False

    @property
    def target(self) -> int:
        """The batch size to aim at."""
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
    #: Indices of the requests that did not fit → how many later ones overtake them.
    overtaken: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """Nothing leaves before `until_mono_ms`, unless a request arrives."""

    until_mono_ms: float


def decide(
    waiting: Sequence[Candidate], free_lanes: int, now_mono_ms: float, knobs: Knobs
) -> Leave | Wait | None:
    """The next batch of `waiting` (most urgent first), given `free_lanes`; None: nothing to do.

    The most urgent group of compatible requests that may leave is chosen. A group that still waits
    for more requests keeps no lane from the groups behind it.
    """
    if not waiting or not free_lanes:
        return None
    until = math.inf
    seen: set[Hashable] = set()
    for index, head in enumerate(waiting):
        if head.alone and index:
            continue  # its turn is when it is first
        if head.alone or not knobs.batchable:
            return Leave((index,), head.rows, knobs.bucket(head.rows))
        if head.compatible not in seen:
            seen.add(head.compatible)
            decision = _decide_group(waiting, index, free_lanes, now_mono_ms, knobs)
            if isinstance(decision, Leave):
                return decision
            until = min(until, decision.until_mono_ms)
    return Wait(until)


@dataclass
class _Batch:
    take: list[int]
    rows: int
    oldest_mono_ms: float
    #: As in `Leave`; if it is not empty the batch does not wait for more requests.
    overtaken: dict[int, int]


def _decide_group(
    waiting: Sequence[Candidate], head: int, free_lanes: int, now_mono_ms: float, knobs: Knobs
) -> Leave | Wait:
    limit = max(knobs.target, waiting[head].rows)
    batch = _fill(waiting, head, limit)
    due = batch.oldest_mono_ms + knobs.max_queue_delay_ms
    if batch.rows < limit and not batch.overtaken and now_mono_ms < due:
        return _preferred(waiting, batch, knobs) or Wait(due)
    if knobs.spread and free_lanes > 1:
        share = max(_share(waiting, head, free_lanes, limit), waiting[head].rows)
        if share < batch.rows:
            batch = _fill(waiting, head, share)
    return Leave(tuple(batch.take), batch.rows, knobs.bucket(batch.rows), batch.overtaken)


def _fill(waiting: Sequence[Candidate], head: int, limit: int) -> _Batch:
    """What fits into `limit` rows with the request at `head`, in order."""
    first = waiting[head]
    compatible, rows, oldest_mono_ms = first.compatible, first.rows, first.arrived_mono_ms
    take = [head]
    overtaken: dict[int, int] = {}
    for index in range(head + 1, len(waiting)):
        if rows >= limit:
            break
        item = waiting[index]
        if item.alone or item.compatible != compatible:
            continue
        if rows + item.rows > limit:
            overtaken[index] = 0
            continue
        if overtaken:
            if any(waiting[i].overtaken + n >= MAX_OVERTAKES for i, n in overtaken.items()):
                break
            for passed in overtaken:
                overtaken[passed] += 1
        take.append(index)
        rows += item.rows
        oldest_mono_ms = min(oldest_mono_ms, item.arrived_mono_ms)
    return _Batch(take, rows, oldest_mono_ms, overtaken)


def _preferred(waiting: Sequence[Candidate], batch: _Batch, knobs: Knobs) -> Leave | None:
    """The largest part of `batch`, from its head on, that is of a preferred size."""
    found: Leave | None = None
    rows = 0
    for count, index in enumerate(batch.take, start=1):
        rows += waiting[index].rows
        if rows in knobs.preferred_batch_sizes:
            found = Leave(tuple(batch.take[:count]), rows, knobs.bucket(rows))
    return found


def _share(waiting: Sequence[Candidate], head: int, free_lanes: int, limit: int) -> int:
    """Rows for each of the free lanes, at most `limit`."""
    rows = 0
    for index in range(head, len(waiting)):
        item = waiting[index]
        if not item.alone and item.compatible == waiting[head].compatible:
            rows += item.rows
            if rows >= limit * free_lanes:
                return limit
    return -(-rows // free_lanes)
