"""What a lane is given and what it returns: batches, runs, and how each request ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from inferq.shared.errors import FatalEngineError, InferqError
from inferq.shared.schema import GpuTimes, Tensors
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.verdicts import Failed, Revoked


class Job(msgspec.Struct, frozen=True, eq=False):
    """Requests that were formed into one batch, most urgent first."""

    items: Sequence[Waiting]
    #: Priority → rows.
    rows: Mapping[int, int]

    @property
    def model(self) -> str:
        """The model of all its requests."""
        return self.items[0].ticket.model


class Run(msgspec.Struct, frozen=True):
    """One successful run of the engine that served a request. Times: monotonic ms."""

    started_mono_ms: float
    ended_mono_ms: float
    rows: int
    padding: int
    requests: int
    gpu: GpuTimes | None = None
    #: The part of it that put the inputs together.
    gather_ms: float = 0.0

    @property
    def split_s(self) -> tuple[float, float, float]:
        """The parts of its time in s: input, compute and output.

        On a GPU the first ends when the inputs are on the card, and the last begins when the
        outputs leave it. Elsewhere the last is 0.
        """
        took_ms = self.ended_mono_ms - self.started_mono_ms
        if self.gpu is None:
            return self.gather_ms / 1000, max(0.0, took_ms - self.gather_ms) / 1000, 0.0
        input_ms, compute_ms = self.gather_ms + self.gpu.h2d_ms, self.gpu.compute_ms
        return input_ms / 1000, compute_ms / 1000, max(0.0, took_ms - input_ms - compute_ms) / 1000


class Outcome(msgspec.Struct, frozen=True):
    """How the compute of one request ended: `outputs` and `run`, or `error`."""

    item: Waiting
    outputs: Tensors | None
    run: Run | None
    error: InferqError | None = None


class Finished(msgspec.Struct):
    """A lane has ended a batch. `late`: requests whose deadline had passed when it began.

    `fatal`: there is no outcome, and the engine cannot be used again.
    """

    job: Job
    outcomes: Sequence[Outcome]
    late: Sequence[Failed | Revoked] = ()
    fatal: FatalEngineError | None = None
    #: Monotonic s.
    began: float = 0.0
    ended: float = 0.0
    #: The number of the lane, from 0.
    lane: int = 0
    #: False while the lanes have enough batches queued: then results may wait for those of the
    #: next.
    lanes_run_short: bool = True
    #: The batch had ended before and was audited now: only `fatal` is new.
    audited: bool = False
