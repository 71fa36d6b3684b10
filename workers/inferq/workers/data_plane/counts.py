"""Counts what a worker has done so far in plain integers; readers get structs.

The data plane's thread counts, once for a batch where that is possible. Any thread may take a
snapshot. There are no locks: a snapshot taken between two additions lacks the second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Final

import msgspec

from inferq.workers.audit.audit import Mismatch
from inferq.workers.claims.runs import Finished, Run
from inferq.workers.claims.settlement import (
    DEAD_LETTER,
    FAILURE,
    OVERTAKEN,
    REVOKED,
    SUCCESS,
)
from inferq.workers.data_plane.observers import Observer, Settled
from inferq.workers.models.not_served import NotServed

#: Upper bounds of the buckets of times, in s; there is one more bucket beyond the last.
SECONDS: Final = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0,
)  # fmt: skip
#: Upper bounds of the buckets of batch sizes, in rows; there is one more bucket beyond the last.
ROWS: Final = tuple(2**power for power in range(11))
#: Likewise, of rows of padding.
PADDING: Final = (0, *ROWS)
#: How a request may end.
OUTCOMES: Final = (SUCCESS, FAILURE, REVOKED, DEAD_LETTER, OVERTAKEN)
#: A request that claims to be sent longer ago, or in the future, counts as sent when it was
#: claimed.
MAX_AGE_MS: Final = 30 * 24 * 3600 * 1000.0


class Histogram(msgspec.Struct):
    """Observations per bucket: not cumulative, with one bucket more than bounds."""

    counts: list[int]
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many observations there are."""
        return sum(self.counts)

    def copied(self) -> Histogram:
        """A copy for another thread."""
        return Histogram(list(self.counts), self.sum)

    def quantile(self, part: float, bounds: Sequence[float]) -> float | None:
        """Where about `part` (0 to 1) of the observations lie below; None: there are none.

        Interpolated within its bucket; beyond the last bound it is that bound.
        """
        total = self.count
        if not total:
            return None
        wanted = part * total
        reached = list(accumulate(self.counts))
        place = bisect_left(reached, wanted)
        while not self.counts[place]:
            place += 1
        if place >= len(bounds):
            return float(bounds[-1])
        low = bounds[place - 1] if place else 0.0
        before = reached[place] - self.counts[place]
        return low + (bounds[place] - low) * (wanted - before) / self.counts[place]


def _empty(bounds: Sequence[float]) -> Histogram:
    return Histogram([0] * (len(bounds) + 1))


class ModelStats(msgspec.Struct, kw_only=True):
    """One model in one worker. All but the gauges grow from the worker's start on."""

    model: str
    version: int
    engine: str
    lanes: int
    max_batch_size: int
    #: Rows that a batch aims at.
    target_batch_size: int
    #: One of `OUTCOMES` → requests that ended with it, once Redis has confirmed that.
    outcomes: dict[str, int]
    #: Wire code → requests that failed with it, dead letters apart.
    errors: dict[str, int]
    #: How often a request was begun again after its worker had died.
    attempts: int
    #: Successful runs of the engine, their rows without padding, and their rows of padding.
    batches: int
    rows: int
    padding_rows: int
    #: Of each such run: rows without padding, and of padding.
    batch_size: Histogram
    padding: Histogram
    #: Of each computed request: sent (claimed, if it does not say when it was sent) → compute.
    queue_s: Histogram
    #: Of each computed request, the times of its batch: gathering the inputs and, on a GPU, copying
    #: them there; the engine's run; on a GPU, copying back and the rest until the lane was done.
    compute_input_s: Histogram
    compute_infer_s: Histogram
    compute_output_s: Histogram
    #: Of each computed request: end of compute → Redis has confirmed its result.
    settle_s: Histogram
    #: Of each request: sent → settled.
    total_s: Histogram
    #: Seconds that lanes have computed, all lanes together.
    busy_s: float
    #: `evidence.Result` → audits that ended so; and the seconds that they took, all together.
    audits: dict[str, int] = {}
    audit_s: float = 0.0
    #: The first answer found to depend on its batch; None: there was none.
    mismatch: Mismatch | None = None
    #: Whether the model runs request by request because of that.
    unbatched: bool = False
    #: Whether it runs on the CPU of a worker that is pinned to a GPU.
    off_gpu: bool = False
    #: Gauges: lanes that compute; requests that wait for a lane here, and that compute.
    lanes_busy: int = 0
    waiting: int = 0
    computing: int = 0

    @property
    def answered(self) -> int:
        """Requests that this worker answered."""
        return sum(self.outcomes.values()) - self.outcomes.get(OVERTAKEN, 0)


class WorkerStats(msgspec.Struct, kw_only=True):
    """One worker process. Times in s of the Unix clock."""

    incarnation: str
    node: str
    host: str
    pid: int
    started_at: float
    #: When this was read.
    at: float
    #: loading, serving or stopping.
    state: str
    #: Whether Redis answers the data plane.
    redis_up: bool
    #: cpu, or the GPU's name.
    device: str
    #: Package → version.
    versions: dict[str, str]
    #: Numbers of `cuda.telemetry.Reading`; None: no GPU, or it does not tell.
    gpu: dict[str, float] | None
    models: list[ModelStats]
    #: Model → requests answered per second since these stats were last published; only published.
    rates: dict[str, float] = {}
    #: Models that it was told to serve and does not.
    not_served: Sequence[NotServed] = ()
    #: Folders of its repository that hold no model.
    passed_over: Sequence[str] = ()


class ModelCounts:
    """Counts one model's requests. `ended` and `settled` are called from one thread only."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.errors: Counter[str] = Counter()
        self.attempts = 0
        self.batches = 0
        self.rows = 0
        self.padding_rows = 0
        self.busy_s = 0.0
        self.batch_size = _empty(ROWS)
        self.padding = _empty(PADDING)
        self.queue_s = _empty(SECONDS)
        self.compute_input_s = _empty(SECONDS)
        self.compute_infer_s = _empty(SECONDS)
        self.compute_output_s = _empty(SECONDS)
        self.settle_s = _empty(SECONDS)
        self.total_s = _empty(SECONDS)

    def ended(self, finished: Finished) -> None:
        """A lane has ended a batch, which was run in one piece or in several."""
        self.busy_s += finished.ended - finished.began
        outcomes = finished.outcomes
        place = 0
        while place < len(outcomes):
            run = outcomes[place].run
            if run is None:
                place += 1
                continue
            place += run.requests
            self.batches += 1
            self.rows += run.rows
            self.padding_rows += run.padding
            self.batch_size.counts[bisect_left(ROWS, run.rows)] += 1
            self.batch_size.sum += run.rows
            self.padding.counts[bisect_left(PADDING, run.padding)] += 1
            self.padding.sum += run.padding

    def settled(  # noqa: C901 - for each request: a call would cost more than what it does
        self, settled: Settled, places: range
    ) -> None:
        """Redis has confirmed the settlements at those `places`, all of this model.

        What is the same for all requests of a run is counted once for all of them. Outcomes are
        counted last, and read first by a snapshot. So a request with a counted outcome is counted
        everywhere.
        """
        sent, overtaken = settled.settlements, settled.overtaken
        now_mono_ms, redis_ms = settled.at_mono_ms, settled.redis_ms
        queue_s, total_s = self.queue_s, self.total_s
        endings: list[str] = []
        run: Run | None = None
        requests, since_s = 0, 0.0
        for place in places:
            done = sent[place]
            ending = done.ending
            if ending is None:
                continue
            if overtaken and place in overtaken:
                endings.append(OVERTAKEN)
            else:
                endings.append(ending)
                if ending == FAILURE:
                    self.errors[done.error_code] += 1
            if done.attempts:
                self.attempts += done.attempts - (ending == DEAD_LETTER)
            claimed_redis_ms = done.slot.claim.claimed_redis_ms
            sent_ms = done.sent_ms
            if sent_ms is None or not 0 <= claimed_redis_ms - sent_ms <= MAX_AGE_MS:
                sent_ms = claimed_redis_ms
            total = max(0.0, redis_ms - sent_ms) / 1000  # the clock may have been set meanwhile
            total_s.counts[bisect_left(SECONDS, total)] += 1
            total_s.sum += total
            if done.run is None:
                continue
            if done.run is not run:
                if run is not None:
                    self._computed(run, requests, now_mono_ms)
                run, requests = done.run, 0
                since_s = (now_mono_ms - run.started_mono_ms) / 1000
            requests += 1
            queue = max(0.0, total - since_s)
            queue_s.counts[bisect_left(SECONDS, queue)] += 1
            queue_s.sum += queue
        if run is not None:
            self._computed(run, requests, now_mono_ms)
        for ending, count in Counter(endings).items():
            self.outcomes[ending] += count

    def _computed(self, run: Run, requests: int, now_mono_ms: float) -> None:
        input_s, infer_s, output_s = run.split_s
        for histogram, value in (
            (self.compute_input_s, input_s),
            (self.compute_infer_s, infer_s),
            (self.compute_output_s, output_s),
            (self.settle_s, (now_mono_ms - run.ended_mono_ms) / 1000),
        ):
            histogram.counts[bisect_left(SECONDS, value)] += requests
            histogram.sum += requests * value

    def stats(self, model: str, version: int, engine: str) -> ModelStats:
        """A snapshot, for any thread."""
        outcomes = dict(self.outcomes)
        return ModelStats(
            model=model,
            version=version,
            engine=engine,
            lanes=0,
            max_batch_size=0,
            target_batch_size=0,
            outcomes=outcomes,
            errors=dict(self.errors),
            attempts=self.attempts,
            batches=self.batches,
            rows=self.rows,
            padding_rows=self.padding_rows,
            batch_size=self.batch_size.copied(),
            padding=self.padding.copied(),
            queue_s=self.queue_s.copied(),
            compute_input_s=self.compute_input_s.copied(),
            compute_infer_s=self.compute_infer_s.copied(),
            compute_output_s=self.compute_output_s.copied(),
            settle_s=self.settle_s.copied(),
            total_s=self.total_s.copied(),
            busy_s=self.busy_s,
        )


class Counts(Observer):
    """Counts what becomes of requests, by model."""

    def __init__(self, models: Mapping[str, ModelCounts]) -> None:
        self._models = models

    def finished(self, finished: Finished) -> None:
        self._models[finished.job.model].ended(finished)

    def settled(self, settled: Settled) -> None:
        """Settlements without an outcome of their own are not counted."""
        sent = settled.settlements
        begin = 0
        while begin < len(sent):
            model, end = sent[begin].model, begin + 1
            while end < len(sent) and sent[end].model == model:
                end += 1
            self._models[model].settled(settled, range(begin, end))
            begin = end
