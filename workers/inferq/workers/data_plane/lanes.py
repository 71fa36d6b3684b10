"""Hop 5. One thread per lane takes a batch, runs it, and hands back one outcome per request.

A bad request fails alone: a batch that raises is run again in halves until the bad request runs by
itself. Batches do not depend on each other, so nothing here needs a lock. Once a batch was handed
back it may be audited (see audit.py).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue

import numpy as np

from inferq.shared.errors import EngineError, FatalEngineError, InferqError, RequestError
from inferq.shared.schema import Tensors, Ticket
from inferq.workers.audit.audit import Audit, OddRows
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.runs import Finished, Job, Outcome, Run
from inferq.workers.claims.verdicts import Failed, Revoked
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Batch, Lane, RowsDiffer, check_rows
from inferq.workers.models.lane_threads import LaneThread, LaneThreads
from inferq.workers.warmup.fit import Fit, lacks_memory

logger = logging.getLogger(__name__)


def execute(  # noqa: C901, PLR0912 - each way in which a batch may fail, in their order
    lane: Lane,
    items: Sequence[Waiting],
    knobs: Knobs,
    odd: OddRows | None = None,
    fit: Fit | None = None,
) -> list[Outcome]:
    """Run `items` as one batch on `lane`, or in halves if that fails or does not fit.

    Raises FatalEngineError.

    If the model is not batchable, each request runs by itself, with its own rows. `odd` notes
    outputs with another number of rows than the inputs.
    """
    if not knobs.batchable and len(items) > 1:
        return [outcome for item in items for outcome in execute(lane, [item], knobs)]
    fit = fit or Fit("")
    rows = sum(item.rows for item in items)
    bucket = knobs.bucket(rows) if knobs.batchable else rows
    batch = Batch(
        [item.inputs for item in items],
        rows,
        bucket,
        knobs.batchable,
        items[0].shared or {},
        _wanted(items),
    )
    started = time.monotonic() * 1000
    outputs: Tensors | None
    try:
        if bucket <= fit.free or rows == 1 or not knobs.batchable:
            outputs = lane.run(batch)
        elif (most := fit.rows(batch.parts[0])) >= bucket:
            with fit.running(batch.parts[0], bucket):
                outputs = lane.run(batch)
        elif len(items) == 1:
            outputs = _in_pieces(lane, batch, int(most), knobs)
        else:
            return _in_halves(lane, items, knobs, odd, fit)
        if knobs.batchable:
            check_rows(outputs, rows)
    except FatalEngineError:
        raise
    except RowsDiffer as problem:
        together = len(items) > 1 or bucket > rows
        if odd is not None:
            odd.note(problem.message, rows, together)
        if not together:
            return [Outcome(items[0], None, None, EngineError(problem.message))]
        outputs = None
    except Exception as problem:  # noqa: BLE001 - whatever an engine raises fails its request
        if (
            not knobs.batchable and knobs.bucket(rows) > rows
        ):  # it may take no fewer rows than its first bucket
            return execute(lane, items, replace(knobs, batchable=True), odd, fit)
        ran = min(bucket, fit.rows(batch.parts[0])) if rows > 1 and knobs.batchable else 1
        if ran > 1 and lacks_memory(problem):
            fit.lower(batch.parts[0], int(ran))
            return execute(lane, items, knobs, odd, fit)
        if len(items) == 1:
            return [Outcome(items[0], None, None, _engine_error(items[0].ticket, problem))]
        outputs = None  # errors of its parts do not have this one as their context
    if outputs is None:
        if len(items) == 1:  # perhaps it succeeds without padding
            return execute(lane, items, replace(knobs, buckets=()), odd, fit)
        return _in_halves(lane, items, knobs, odd, fit)
    run = Run(
        started,
        time.monotonic() * 1000,
        rows,
        bucket - rows,
        len(items),
        lane.gpu_times,
        batch.gather_ms,
    )
    if batch.errors:
        return _with_errors(items, outputs, run, batch.errors)
    if len(items) == 1:
        return [Outcome(items[0], outputs, run)]
    outcomes: list[Outcome] = []
    row = 0
    for item in items:
        part_outputs = {name: array[row : row + item.rows] for name, array in outputs.items()}
        outcomes.append(Outcome(item, part_outputs, run))
        row += item.rows
    return outcomes


def _wanted(items: Sequence[Waiting]) -> Sequence[str] | None:
    """The outputs that any of `items` wants; None: one wants all."""
    wanted: dict[str, None] = {}
    for item in items:
        if item.outputs is None:
            return None
        wanted.update(dict.fromkeys(item.outputs))
    return list(wanted)


def _with_errors(
    items: Sequence[Waiting], outputs: Tensors, run: Run, errors: Mapping[int, RequestError]
) -> list[Outcome]:
    """A request with an error in one of its rows is answered by the first of these alone."""
    outcomes: list[Outcome] = []
    row = 0
    for item in items:
        rows = range(row, row + item.rows)
        row += item.rows
        if (error := next((errors[each] for each in rows if each in errors), None)) is not None:
            outcomes.append(Outcome(item, None, None, error))
            continue
        own = outputs if len(items) == 1 else {n: a[rows.start : row] for n, a in outputs.items()}
        outcomes.append(Outcome(item, own, run))
    return outcomes


def _in_halves(
    lane: Lane, items: Sequence[Waiting], knobs: Knobs, odd: OddRows | None, fit: Fit
) -> list[Outcome]:
    half = len(items) // 2
    return [
        outcome
        for part in (items[:half], items[half:])
        for outcome in execute(lane, part, knobs, odd, fit)
    ]


def _in_pieces(lane: Lane, batch: Batch, most: int, knobs: Knobs) -> Tensors:
    """Run one request with more rows than fit, `most` rows at a time: its rows are independent."""
    most = max((size for size in knobs.buckets if size <= most), default=most)
    (inputs,) = batch.parts
    pieces: list[Tensors] = []
    for begin in range(0, batch.rows, most):
        part = {name: array[begin : begin + most] for name, array in inputs.items()}
        rows = min(most, batch.rows - begin)
        piece = Batch([part], rows, knobs.bucket(rows), True, batch.shared, batch.outputs)
        pieces.append(lane.run(piece))
        if piece.errors:
            batch.errors = {begin + row: error for row, error in piece.errors.items()}
            return {}
        check_rows(pieces[-1], rows)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _engine_error(ticket: Ticket, problem: Exception) -> InferqError:
    if isinstance(problem, InferqError):
        return problem
    told = about(ticket.id, model=ticket.model)
    logger.error("the engine raised on %s", ticket.id, exc_info=problem, extra=told)
    return EngineError(f"{type(problem).__name__}: {problem}")


class Lanes:
    """One model's lanes, each driven by its thread of `threads`, which end with `stop`.

    A free lane takes the next batch. So a batch that is put while all are busy starts without a
    pause. `too_late` returns why a request need not be computed any more. `on_begun` (a batch
    starts) and `on_finished` may only take note. The lanes' threads call all three.
    """

    def __init__(
        self,
        name: str,
        lanes: Sequence[Lane],
        threads: LaneThreads,
        knobs: Knobs,
        too_late: Callable[[Slot, Ticket], Failed | Revoked | None],
        on_finished: Callable[[Finished], None],
        on_begun: Callable[[Sequence[Waiting]], None] = lambda _: None,
        audit: Audit | None = None,
        fit: Fit | None = None,
    ) -> None:
        self._name = name
        self._knobs = knobs
        self._knobs_alone = replace(knobs, batchable=False)
        self._fit = fit or Fit(name)
        self._audit = audit or Audit(name, 0, knobs, unbatch=False)
        self._odd = [OddRows() for _ in lanes]
        self._too_late = too_late
        self._on_finished = on_finished
        self._on_begun = on_begun
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        #: If so many batches wait for the lanes, results may wait for those of the next batch.
        self.enough_ahead = math.inf
        #: The batch that each lane computes, and since when (monotonic ms).
        self._computing: list[tuple[Job, float] | None] = [None] * len(lanes)
        self._lanes = list(lanes)
        self._all_threads = threads
        self._threads: list[LaneThread] = []

    def __len__(self) -> int:
        return len(self._lanes)

    def start(self) -> None:
        """Drive the lanes from now on."""
        self._threads = [self._all_threads.of(lane) for lane in self._lanes]
        for number, (lane, thread) in enumerate(zip(self._lanes, self._threads, strict=True)):
            thread.call(functools.partial(self._run, number, lane)).add_done_callback(self._tell)
        self._all_threads.end()

    def _tell(self, ended: Future[None]) -> None:
        problem = ended.exception()
        if problem is not None:
            logger.critical("a lane of %s drives no more batches", self._name, exc_info=problem)

    def put(self, job: Job) -> None:
        """Queue a batch for the first lane that is free."""
        self._inbox.put(job)

    def take_back(self) -> list[Job]:
        """Take back the batches that no lane has begun."""
        taken: list[Job] = []
        while True:
            try:
                job = self._inbox.get_nowait()
            except Empty:
                return taken
            if job is not None:
                taken.append(job)

    def computing(self) -> list[tuple[Job, float]]:
        """The batches that lanes have begun, and when (monotonic ms). For any thread."""
        return [begun for begun in list(self._computing) if begun is not None]

    def stop(self, timeout: float) -> bool:
        """End the threads once they are free; False if that took longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether one of the threads has not ended."""
        return any(thread.is_alive for thread in self._threads)

    def _run(self, number: int, lane: Lane) -> None:
        audit, budget = self._audit, self._audit.budget
        while (job := self._inbox.get()) is not None:
            began = time.monotonic()
            self._computing[number] = job, began * 1000
            # kill point: lane-begun
            try:
                finished = self._compute(number, lane, job)
            except Exception as problem:  # else this batch would never end
                logger.critical("a lane of %s failed", self._name, exc_info=True)
                reason = f"its lane failed: {type(problem).__name__}: {problem}"
                finished = Finished(job, (), fatal=FatalEngineError(reason))
            finished.began, finished.ended = began, time.monotonic()
            finished.lane = number
            finished.lanes_run_short = self._inbox.qsize() < self.enough_ahead
            self._computing[number] = None
            # kill point: lane-ended
            self._on_finished(finished)
            if finished.fatal is not None:
                return
            budget.left -= 1
            if budget.left <= 0 and audit.is_due(finished, self._inbox.empty()):
                try:
                    audit.run(lane, finished.outcomes)
                except FatalEngineError as fatal:
                    self._on_finished(Finished(job, (), fatal=fatal, audited=True))
                    return
            del job, finished  # do not keep its arrays: the receiver frees them

    def _compute(self, number: int, lane: Lane, job: Job) -> Finished:
        items: list[Waiting] = []
        late: list[Failed | Revoked] = []
        for item in job.items:
            verdict = self._too_late(item.slot, item.ticket)
            if verdict is None:
                items.append(item)
            else:
                late.append(verdict)
        try:
            if items:
                self._on_begun(items)
            return Finished(job, self._outcomes(number, lane, job, items) if items else (), late)
        except FatalEngineError as fatal:
            return Finished(job, (), fatal=fatal)

    def _outcomes(
        self, number: int, lane: Lane, job: Job, items: Sequence[Waiting]
    ) -> Sequence[Outcome]:
        if not self._audit.unbatched:
            odd = self._odd[number]
            outcomes = execute(lane, items, self._knobs, odd, self._fit)
            if odd.together or odd.alone:
                self._audit.odd_rows(odd, failed=any(each.error for each in outcomes))
                odd.clear()
            return outcomes
        outcomes = []
        for item in items:
            self._computing[number] = job, time.monotonic() * 1000  # max_run_seconds is of one run
            outcomes += execute(lane, [item], self._knobs_alone)
        return outcomes
