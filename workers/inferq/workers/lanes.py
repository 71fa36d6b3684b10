"""Hop 5. One thread per lane: takes a batch, runs it, hands back one outcome per request.

A bad request fails alone: a batch that raises is run again in halves until the culprit is by
itself. Batches do not depend on each other, so nothing here needs a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import msgspec

from inferq.shared.errors import EngineError, FatalEngineError, InferqError
from inferq.shared.schema import Tensors
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.engines.base import Batch, Lane

logger = logging.getLogger(__name__)


class Job(msgspec.Struct, frozen=True):
    """A batch on its way to a lane."""

    items: Sequence[Waiting]
    rows: int
    bucket: int
    #: ``time.monotonic()`` in ms when it was formed.
    formed_ms: float


class Run(msgspec.Struct, frozen=True):
    """One successful run of the engine that served a request. Times: monotonic ms."""

    started_ms: float
    ended_ms: float
    rows: int
    padding: int
    requests: int


class Outcome(msgspec.Struct, frozen=True):
    """How the compute of one request ended: `outputs` and `run`, or `error`."""

    item: Waiting
    outputs: Tensors | None
    run: Run | None
    error: InferqError | None = None


class Finished(msgspec.Struct, frozen=True):
    """A lane is free again. `fatal`: no outcome, the engine is beyond use."""

    lane: LaneThread
    job: Job
    outcomes: Sequence[Outcome]
    fatal: FatalEngineError | None = None


def execute(lane: Lane, items: Sequence[Waiting], rows: int, knobs: Knobs) -> list[Outcome]:
    """Run `items` as one batch on `lane`; in halves where that fails. Raises FatalEngineError."""
    bucket = knobs.bucket(rows) if knobs.batchable else rows
    batch = Batch([item.inputs for item in items], rows, bucket, knobs.batchable)
    started = time.monotonic() * 1000
    try:
        outputs = lane.run(batch)
        if knobs.batchable:
            _check_rows(outputs, rows)
    except FatalEngineError:
        raise
    except Exception as problem:  # noqa: BLE001 - whatever an engine raises fails its request
        if len(items) == 1:
            return [Outcome(items[0], None, None, _engine_error(problem))]
        half = len(items) // 2
        return [
            outcome
            for part in (items[:half], items[half:])
            for outcome in execute(lane, part, sum(item.rows for item in part), knobs)
        ]
    run = Run(started, time.monotonic() * 1000, rows, bucket - rows, len(items))
    if len(items) == 1:
        return [Outcome(items[0], outputs, run)]
    outcomes: list[Outcome] = []
    row = 0
    for item in items:
        part_outputs = {name: array[row : row + item.rows] for name, array in outputs.items()}
        outcomes.append(Outcome(item, part_outputs, run))
        row += item.rows
    return outcomes


def _check_rows(outputs: Tensors, rows: int) -> None:
    for name, array in outputs.items():
        got = array.shape[0] if array.ndim else "no"
        if got != rows:
            raise EngineError(f"output {name!r} has {got} rows; expected {rows}, as the inputs")


def _engine_error(problem: Exception) -> InferqError:
    if isinstance(problem, InferqError):
        return problem
    logger.error("the engine raised", exc_info=problem)
    return EngineError(f"{type(problem).__name__}: {problem}")


class LaneThread:
    """Drives one lane. `on_finished` is called from its thread, and must only take note."""

    def __init__(
        self, name: str, lane: Lane, knobs: Knobs, on_finished: Callable[[Finished], None]
    ) -> None:
        self._lane = lane
        self._knobs = knobs
        self._on_finished = on_finished
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        #: The batch that it has, if any; set and cleared by the data plane's thread.
        self.job: Job | None = None

    def start(self) -> None:
        self._thread.start()

    def put(self, job: Job) -> None:
        """Give the lane its next batch. It must be free."""
        self.job = job
        self._inbox.put(job)

    def stop(self, timeout: float) -> bool:
        """End the thread once it is free; False if that took longer than `timeout` seconds."""
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._inbox.get()) is not None:
            try:
                outcomes = execute(self._lane, job.items, job.rows, self._knobs)
                finished = Finished(self, job, outcomes)
            except FatalEngineError as fatal:
                finished = Finished(self, job, (), fatal)
            self._on_finished(finished)
