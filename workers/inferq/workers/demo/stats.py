"""The results of a run: counts, rates, percentiles, and where the requests' time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from inferq.producer.pending import Result
from inferq.shared.errors import InferqError
from inferq.shared.schema import Receipt


@dataclass(frozen=True)
class Latency:
    """Percentiles of submit → decoded result, in ms."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class TimeSpent:
    """Means per request in ms; `queue`, `compute` and `rest` add up to the mean latency.

    `forming` and `settling` are parts of `rest`, from the worker's receipts. The other part of it
    is Redis, the network and the client.
    """

    queue: float
    compute: float
    rest: float
    forming: float
    settling: float


@dataclass(frozen=True)
class Figures:
    """One run in numbers; `latency_ms` and `time_ms` are None if nothing succeeded."""

    requests: int
    errors: int
    #: Requests answered per second, errors included.
    rps: float
    seconds: float
    latency_ms: Latency | None
    time_ms: TimeSpent | None
    #: Rows in a batch → number of such batches.
    batch_sizes: dict[int, int]
    #: Wire code → requests that ended with it.
    error_codes: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain types, as ``inferq demo --json`` writes them."""
        return asdict(self)


class Tally:
    """Takes outcomes one by one; `figures` sums them up."""

    def __init__(self) -> None:
        #: Duration of the run, first submit → last result, in s. The caller sets it.
        self.seconds = 0.0
        self._errors: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._receipts: list[Receipt] = []

    @classmethod
    def of(cls, tallies: Sequence[Tally]) -> Self:
        """Several runs, one after the other, as one."""
        whole = cls()
        for tally in tallies:
            whole.seconds += tally.seconds
            whole._errors += tally._errors
            whole._latencies += tally._latencies
            whole._receipts += tally._receipts
        return whole

    def add(self, outcome: Result | InferqError) -> None:
        if isinstance(outcome, InferqError):
            self._errors[outcome.code] += 1
            return
        self._latencies.append(outcome.latency_ms)
        if outcome.receipt is not None:
            self._receipts.append(outcome.receipt)

    @property
    def count(self) -> int:
        """Outcomes taken."""
        return self._errors.total() + len(self._latencies)

    def figures(self) -> Figures:
        return Figures(
            requests=self.count,
            errors=self._errors.total(),
            rps=self.count / self.seconds if self.seconds else 0.0,
            seconds=self.seconds,
            latency_ms=self._latency(),
            time_ms=self._time_spent(),
            batch_sizes=self._batch_sizes(),
            error_codes=dict(sorted(self._errors.items())),
        )

    def _latency(self) -> Latency | None:
        if not self._latencies:
            return None
        return Latency(*(float(p) for p in np.percentile(self._latencies, (50, 95, 99))))

    def _time_spent(self) -> TimeSpent | None:
        if not self._receipts:
            return None
        count = len(self._receipts)
        queue = sum(receipt.queue_ms or 0.0 for receipt in self._receipts) / count
        compute = sum(receipt.compute_ms for receipt in self._receipts) / count
        return TimeSpent(
            queue=queue,
            compute=compute,
            rest=sum(self._latencies) / len(self._latencies) - queue - compute,
            forming=sum(receipt.form_ms for receipt in self._receipts) / count,
            settling=sum(receipt.settle_ms for receipt in self._receipts) / count,
        )

    def _batch_sizes(self) -> dict[int, int]:
        # Each request's receipt has its batch, so a batch of n requests appears n times.
        batches: dict[int, float] = {}
        for receipt in self._receipts:
            batches[receipt.batch_size] = batches.get(receipt.batch_size, 0) + 1 / receipt.requests
        return {size: max(1, round(batches[size])) for size in sorted(batches)}
