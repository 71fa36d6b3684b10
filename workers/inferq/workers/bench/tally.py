"""Counts of requests: by the window that they were due in, and by the one that they ended in."""

from __future__ import annotations

from typing import Final

import msgspec

from inferq.shared.errors import DeadlineExceeded, InferqError, ResultTimeout
from inferq.shared.schema import Receipt
from inferq.workers.bench.histogram import Histogram

#: Most names of workers and engines that are remembered.
MAX_NAMES: Final = 256
#: Answers that came too late, or not at all. Their latency is the time waited for them; latencies
#: without them would leave out the slowest requests.
OUT_OF_TIME: Final = (DeadlineExceeded, ResultTimeout)


class Split(msgspec.Struct):
    """Sums over receipts. Times in ms; `Receipt` says what each is."""

    receipts: int = 0
    #: From due to pushed.
    late: float = 0.0
    queue: float = 0.0
    form: float = 0.0
    compute: float = 0.0
    settle: float = 0.0
    #: The rest of the latency: connections, Redis, the result's way back.
    other: float = 0.0
    #: Receipts from a GPU, and the sums over these.
    gpu_receipts: int = 0
    h2d: float = 0.0
    gpu_compute: float = 0.0
    d2h: float = 0.0
    #: Each request counts as its share of its batch, so these sums are of whole batches.
    batches: float = 0.0
    batch_rows: float = 0.0
    padding: float = 0.0
    #: Requests that were computed again after a worker had died computing them.
    attempted_again: int = 0

    def add(self, receipt: Receipt, late_ms: float, latency_ms: float) -> None:
        """Count one answer: pushed `late_ms` and answered `latency_ms` after it was due."""
        computed = receipt.form_ms + receipt.compute_ms + receipt.settle_ms
        # Measured by Redis' clock as two machines know it, so it may be longer than the latency.
        queue = max(0.0, min(receipt.queue_ms or 0.0, latency_ms - late_ms - computed))
        inside = queue + computed
        self.receipts += 1
        self.late += late_ms
        self.queue += queue
        self.form += receipt.form_ms
        self.compute += receipt.compute_ms
        self.settle += receipt.settle_ms
        self.other += latency_ms - late_ms - inside
        share = 1 / max(1, receipt.requests)
        self.batches += share
        self.batch_rows += receipt.batch_size * share
        self.padding += receipt.padding * share
        self.attempted_again += receipt.attempt > 1
        if receipt.gpu_compute_ms is not None:
            self.gpu_receipts += 1
            self.h2d += receipt.gpu_h2d_ms or 0.0
            self.gpu_compute += receipt.gpu_compute_ms
            self.d2h += receipt.gpu_d2h_ms or 0.0

    def merge(self, other: Split) -> None:
        """Add all sums of `other`."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Tally(msgspec.Struct):
    """Requests that were due in one window, whenever they ended."""

    sent: int = 0
    #: Refused by admission since the queue is at one of its limits. Nothing was sent.
    refused: int = 0
    #: Due while as many requests were in flight as allowed, or not reached before the step's end.
    not_sent: int = 0
    succeeded: int = 0
    #: Answered with an error, or refused by Redis, by the error's code.
    errors: dict[str, int] = msgspec.field(default_factory=dict)
    #: Without an answer at the end of the wait.
    unanswered: int = 0
    #: From due to answered: of successes, and of requests that ran out of time.
    latency: Histogram = msgspec.field(default_factory=Histogram)
    #: From due to pushed, of all requests that were sent.
    late: Histogram = msgspec.field(default_factory=Histogram)
    split: Split = msgspec.field(default_factory=Split)
    workers: set[str] = msgspec.field(default_factory=set)
    #: As in "onnxruntime, version 1".
    engines: set[str] = msgspec.field(default_factory=set)

    def fail(self, error: InferqError, latency: float) -> None:
        """Count one failure, `latency` seconds after it was due."""
        self.errors[error.code] = self.errors.get(error.code, 0) + 1
        if isinstance(error, OUT_OF_TIME):
            self.latency.add(latency)

    def abandon(self, waited: float) -> None:
        """Count one request for which nobody waits any more, `waited` seconds after it was due."""
        self.unanswered += 1
        self.latency.add(waited)

    def succeed(self, receipt: Receipt | None, late: float, latency: float) -> None:
        """Count one answer; times in seconds."""
        self.succeeded += 1
        self.latency.add(latency)
        if receipt is None:
            return
        self.split.add(receipt, late * 1000, latency * 1000)
        if len(self.workers) < MAX_NAMES and len(self.engines) < MAX_NAMES:
            self.workers.add(receipt.worker)
            self.engines.add(f"{receipt.engine}, version {receipt.version}")

    @property
    def due(self) -> int:
        """All that should have been sent."""
        return self.sent + self.refused + self.not_sent

    @property
    def failed(self) -> int:
        """Ended with an error."""
        return sum(self.errors.values())

    def merge(self, other: Tally) -> None:
        """Count all of `other` in."""
        self.sent += other.sent
        self.refused += other.refused
        self.not_sent += other.not_sent
        self.succeeded += other.succeeded
        self.unanswered += other.unanswered
        for code, count in other.errors.items():
            self.errors[code] = self.errors.get(code, 0) + count
        self.latency.merge(other.latency)
        self.late.merge(other.late)
        self.split.merge(other.split)
        self.workers |= other.workers
        self.engines |= other.engines


class Ended(msgspec.Struct):
    """Requests that ended in one window, whenever they were due."""

    succeeded: int = 0
    failed: int = 0
    latency: Histogram = msgspec.field(default_factory=Histogram)
    #: CPU seconds of the producer processes meanwhile.
    cpu_s: float = 0.0

    def merge(self, other: Ended) -> None:
        """Count all of `other` in."""
        self.succeeded += other.succeeded
        self.failed += other.failed
        self.latency.merge(other.latency)
        self.cpu_s += other.cpu_s
