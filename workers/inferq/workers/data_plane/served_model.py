"""One model as a worker serves it: its engine, lanes, waiting requests and knobs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.shared.names import Names
from inferq.shared.schema import ModelAdvert
from inferq.workers.audit.audit import Audit
from inferq.workers.batching.padding import Padding
from inferq.workers.batching.policy import Knobs, Leave, Wait, decide
from inferq.workers.batching.waiting import Waiting, WaitingRequests, rows_by_priority
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.runs import Finished, Job
from inferq.workers.data_plane.budget import Sizes
from inferq.workers.data_plane.counts import ModelCounts, ModelStats
from inferq.workers.data_plane.foreign_tasks import ForeignTasks
from inferq.workers.data_plane.intake import Intake
from inferq.workers.data_plane.lanes import Lanes
from inferq.workers.data_plane.results import Results
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Engine
from inferq.workers.models.registry import engine_class
from inferq.workers.models.spec import ModelSpec
from inferq.workers.pad_probe.probe import probe_padding
from inferq.workers.warmup.fit import row_elements
from inferq.workers.warmup.learning import Learner
from inferq.workers.warmup.prepare import Preparation, Prepared

logger = logging.getLogger(__name__)

#: How much the newest request weighs in the mean rows per request.
_ROWS_WEIGHT = 0.1
#: Most requests that one claim asks for.
MAX_CLAIM = 1024
#: Each lane has one batch formed ahead of it, or as many as it computes in so many seconds, but
#: never more than so many: where batches are short, most of what a request costs is that it is
#: claimed and settled by itself.
AHEAD_S = 0.02
MAX_AHEAD = 16
#: How much the newest batch weighs in the mean time of a batch, if it was a short one.
_BATCH_WEIGHT = 0.1
#: Of batches that take less than so many seconds, one in so many is learnt from: that costs 3 µs.
SHORT_S = 0.01
LEARN_OF = 16


class ServedModel:
    """Owned by the data plane's thread once `load` has returned."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.waiting = WaitingRequests()
        #: Batches that were formed and have not ended, in this order: the lanes compute the first
        #: of them, the others were formed ahead.
        self.jobs: list[Job] = []
        #: Seconds that a batch takes, rather too many than too few; 0: not known.
        self._batch_s = 0.0
        self._rows_per_request = 1.0
        #: Until it is loaded: None.
        self._target: int | None = None
        self._engine: Engine | None = None
        self._preparation = Preparation(spec)
        self._prepared: Prepared | None = None
        #: None: nothing was measured that could be refined, or model.toml says what to aim at.
        self._learner: Learner | None = None
        #: Batches that have ended, while there is something to learn.
        self._ended = 0
        self._lanes = Lanes(f"inferq-{self.name}")
        #: False while ``control cancel_consumer`` holds: nothing is claimed.
        self.consuming = True
        #: What has become of its requests since the start.
        self.counts = ModelCounts()
        config = spec.config
        self.audit = Audit(self.name, config.audit_every, unbatch=config.on_mismatch == "unbatch")
        #: Monotonic ms at which waiting requests may leave; None: when something changes.
        self.due_ms: float | None = None

    def load(
        self,
        worker: str,
        names: Names,
        clock: RedisClock,
        *,
        is_revoked: Callable[[str], bool],
        on_finished: Callable[[Finished], None],
        result_expires_s: int,
        on_begun: Callable[[Sequence[Waiting]], None] = lambda _: None,
        wake: Callable[[], None] = lambda: None,
        foreign: ForeignTasks | None = None,
        links: LinkQueues | None = None,
    ) -> None:
        """Load the engine, warm it up, start the lanes' threads. ConfigError if it cannot be."""
        self._steps = names.priority_steps
        spec = self.spec
        config = spec.config
        self._tell_of_rows()
        engine = engine_class(config.engine)(spec)
        began = time.monotonic()
        self._preparation.start()
        self._load(engine)
        self._engine = engine
        self._buckets = engine.buckets
        padding = self._pad(engine)
        prepared = self._prepared = self._preparation.prepare(engine)
        tuning = prepared.tuning
        preferred = tuple(n for n in config.preferred_batch_sizes if n <= prepared.rows)
        if not config.preferred_batch_sizes and tuning is not None and spec.batchable:
            preferred = (tuning.best,)
            if len(tuning.sizes) > 1:
                self._learner = Learner(tuning, tuning.best)
        self.knobs = Knobs(
            max_batch_size=prepared.rows,
            preferred_batch_sizes=preferred,
            max_queue_delay_ms=config.max_queue_delay_ms,
            buckets=self._buckets,
            batchable=spec.batchable,
            spread=engine.parallel_lanes,
        )
        self._aim_at(self.knobs)
        self.advert: ModelAdvert = spec.advert(
            seconds_per_row=tuning.seconds_per_row if tuning else 0.0,
            result_expires_s=result_expires_s,
        )
        self.sizes = Sizes(self.advert)
        links = links or LinkQueues(names)
        self.intake = Intake(self.advert, names, padding, is_revoked, clock.now, links, foreign)
        self.results = Results(worker, config.engine, spec.version, padding)
        prepared.serve()
        counts = self.counts
        self.audit.begin(
            self.knobs, lambda: counts.busy_s, lambda: sum(counts.outcomes.values()), wake
        )
        self._lanes.start(
            prepared.lanes, self.knobs, self.intake.too_late, on_finished, on_begun, self.audit,
            prepared.fit,
        )  # fmt: skip
        logger.info(
            "model %s version %d: %s, %d lanes, batches of %d, ready in %.1f s",
            self.name, spec.version, config.engine, len(self._lanes), self.knobs.target,
            time.monotonic() - began, extra=about(model=self.name),
        )  # fmt: skip

    def _tell_of_rows(self) -> None:
        """Say why requests do not share batches, or what is known of those that do."""
        why, remark = self.spec.why_not_batchable, self.spec.remark
        told = about(model=self.name)
        if why is not None:
            logger.warning("model %s runs request by request: %s", self.name, why, extra=told)
        elif remark is not None:
            logger.warning("model %s is batched: %s", self.name, remark, extra=told)

    def _load(self, engine: Engine) -> None:
        with self._named():
            engine.load()

    def _pad(self, engine: Engine) -> Padding:
        with self._named():
            return probe_padding(engine)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Make what is raised a ConfigError that names the model, which may be one of many."""
        try:
            yield
        except FatalEngineError:
            raise
        except (ConfigError, EngineError) as problem:
            known = repr(self.name) in problem.message or str(self.spec.path) in problem.message
            named = problem.message if known else f"model {self.name!r}: {problem.message}"
            raise ConfigError(named) from problem

    def _aim_at(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self._target = knobs.target
        self._ahead_knobs = replace(
            knobs, preferred_batch_sizes=(knobs.target,), max_queue_delay_ms=math.inf
        )

    # --- claiming ---------------------------------------------------------------------------

    def room(self) -> dict[int, int]:
        """Priority step → how many more requests of it to claim: what may be formed ahead.

        Less urgent ones that wait already do not count: an urgent request is always let in.
        """
        held = self.waiting.rows.copy()
        for job in self.jobs[len(self._lanes) :]:
            for priority, count in job.rows.items():
                held[priority] = held.get(priority, 0) + count
        rows = len(self._lanes) * self._depth * self.knobs.target
        room: dict[int, int] = {}
        for step in self._steps:
            rows -= held.get(step, 0)
            room[step] = min(MAX_CLAIM, max(0, -int(-rows // self._rows_per_request)))
        return room

    def add(self, item: Waiting) -> None:
        self.waiting.add(item)
        self._rows_per_request += _ROWS_WEIGHT * (item.rows - self._rows_per_request)

    # --- forming ----------------------------------------------------------------------------

    def form(self, now_ms: float) -> Iterator[Job]:
        """The batches to `put` now: none while the first in line is a suspect."""
        while (decision := self._decide(now_ms)) is not None:
            yield self._form(decision)

    def suspect(self) -> bool:
        """Whether the first in line may have ended a worker: it is to compute all by itself."""
        return bool(self.waiting) and self.waiting.items[0].alone

    def form_suspect(self) -> Job:
        """The suspect's own batch."""
        return self._form(Leave((0,), self.waiting.items[0].rows, 0))

    def _form(self, decision: Leave) -> Job:
        items = self.waiting.take(decision)
        job = Job(items, rows_by_priority(items))
        self.jobs.append(job)
        return job

    def _decide(self, now_ms: float) -> Leave | None:
        """The next batch for a free lane or, once all compute, the next full one for whichever
        lane is free first: requests that still lack company keep the chance to find it.
        """
        if self.suspect():
            return None
        free = len(self._lanes) - len(self.jobs)
        if free > 0:
            decision = decide(self.waiting.items, free, now_ms, self.knobs)
            self.due_ms = decision.until_ms if isinstance(decision, Wait) else None
        else:
            self.due_ms = None
            if -free >= len(self._lanes) * self._depth:
                return None
            items = self.waiting.items
            decision = decide(items, 1, now_ms, self._ahead_knobs)
            if (
                isinstance(decision, Leave)
                and items[decision.take[0]].ticket.priority > items[0].ticket.priority
            ):  # or it would be computed before the more urgent ones that lack company
                return None
        return decision if isinstance(decision, Leave) else None

    @property
    def _depth(self) -> int:
        """Batches that may be formed ahead of each lane."""
        if not self._batch_s:
            return 1
        return max(1, min(MAX_AHEAD, math.ceil(AHEAD_S / self._batch_s)))

    def relaxed(self) -> bool:
        """Whether so much is formed ahead of the lanes that claiming and settling may wait."""
        return len(self.jobs) - len(self._lanes) >= self._lanes.ample

    def brisk(self) -> bool:
        """Whether batches are short and some are formed ahead: ends of batches may go untold."""
        return self._lanes.ample < math.inf and len(self.jobs) > len(self._lanes)

    def least_urgent(self) -> int:
        """The least urgent priority in the batches that were formed."""
        return max(job.items[-1].ticket.priority for job in self.jobs)

    def put(self, job: Job) -> None:
        """Have the lanes compute a formed batch."""
        self._lanes.put(job)

    def recall(self) -> list[Waiting]:
        """Let requests of batches that no lane has begun wait again; return them."""
        recalled: list[Waiting] = []
        for job in self._lanes.take_back():
            self.jobs.remove(job)
            recalled += job.items
        for item in recalled:
            self.waiting.add(item)
        return recalled

    def overtaken(self) -> bool:
        """Whether a request waits that is more urgent than one in a batch formed ahead."""
        ahead = self.jobs[len(self._lanes) :]
        if not ahead or not self.waiting:
            return False
        urgent = self.waiting.items[0].ticket.priority
        return any(job.items[-1].ticket.priority > urgent for job in ahead)

    def ended(self, job: Job, took_s: float | None = None) -> None:
        """A lane has finished `job`; or, without `took_s`, none will ever begin it."""
        self.jobs.remove(job)
        if took_s is not None:
            smoothed = self._batch_s + _BATCH_WEIGHT * (took_s - self._batch_s)
            self._batch_s = max(took_s, smoothed)
            lanes, depth = len(self._lanes), self._depth
            self._lanes.ample = max(lanes, lanes * depth // 4) if depth > 1 else math.inf
        if self.audit.unbatched and self.knobs.batchable:
            self._unbatch()

    def _unbatch(self) -> None:
        """An audit found that answers depend on company: form no more batches."""
        alone = replace(self.knobs, batchable=False, preferred_batch_sizes=(1,))
        self.knobs = alone
        self._ahead_knobs = replace(alone, max_queue_delay_ms=math.inf)
        self._target = alone.target

    def learn(self, finished: Finished) -> None:
        """Refine the size that is aimed at by how long this batch took, if all lanes were busy."""
        learner, outcomes = self._learner, finished.outcomes
        if learner is None:
            return
        self._ended += 1
        if finished.ended - finished.began < SHORT_S and self._ended % LEARN_OF:
            return
        if not outcomes or len(self.jobs) < len(self._lanes):
            return
        run = outcomes[0].run
        if run is None or run.requests != len(outcomes):  # it was run in parts
            return
        assert self._prepared is not None
        if row_elements(outcomes[0].item.inputs) != self._prepared.row_elements:
            return  # longer or shorter rows than those that were measured
        before = learner.target
        if learner.ran(run.rows + run.padding, (run.ended_ms - run.started_ms) / 1000):
            logger.info(
                "model %s: batches of %d in place of %d from now on, as its batches ran since",
                self.name, learner.target, before, extra=about(model=self.name),
            )  # fmt: skip
            self._aim_at(replace(self.knobs, preferred_batch_sizes=(learner.target,)))

    @property
    def lanes(self) -> int:
        """0 until it is loaded."""
        return len(self._lanes)

    @property
    def _aim(self) -> int:
        return self._target or self.spec.max_batch_size

    @property
    def _most(self) -> int:
        return self._prepared.rows if self._prepared is not None else self.spec.max_batch_size

    def fill(self) -> str:
        """How full its batches were so far: ``5.2 of 8 rows``. For any thread."""
        batches, rows = self.counts.batches, self.counts.rows
        return f"{rows / batches:.1f} of {self._aim} rows" if batches else "no batch yet"

    def stats(self) -> ModelStats:
        """What has become of its requests so far, and how many it has now. For any thread."""
        computing = self.computing()
        stats = self.counts.stats(self.name, self.spec.version, self.spec.config.engine)
        stats.lanes, stats.max_batch_size = self.lanes, self._most
        stats.target_batch_size = self._aim
        stats.lanes_busy = len(computing)
        stats.computing = sum(len(job.items) for job, _ in computing)
        stats.waiting = len(self.reserved())
        audit = self.audit
        stats.audits = {result.value: count for result, count in audit.results.items()}
        stats.audit_s, stats.mismatch = audit.took_s, audit.mismatch
        stats.unbatched = audit.unbatched
        return stats

    def computing(self) -> list[tuple[Job, float]]:
        """The batches that lanes have begun, and when (monotonic ms). For any thread."""
        return self._lanes.computing()

    def reserved(self) -> list[Waiting]:
        """The requests that are claimed and that no lane has begun. For any thread."""
        begun = [job for job, _ in self.computing()]
        ahead = [item for job in list(self.jobs) if job not in begun for item in job.items]
        return [*ahead, *list(self.waiting.items)]

    def overdue(self) -> bool:
        """Whether a batch, or an audit, has been computing for longer than max_run_seconds."""
        limit = self.spec.config.max_run_seconds * 1000
        now = time.monotonic() * 1000
        since = self.audit.since
        if since is not None and now - since * 1000 > limit:
            return True
        return any(now - began_ms > limit for _, began_ms in self.computing())

    @property
    def is_driven(self) -> bool:
        """Whether a lane's thread is there."""
        return self._lanes.is_alive

    def told_to_end(self) -> None:
        """Whatever ends this process from now on, no batch is to blame. For any thread."""
        self._preparation.told_to_end()

    def close(self, timeout: float) -> None:
        """End the lanes and free the engine, unless a lane does not end in time."""
        learner, self._learner = self._learner, None
        if learner is not None and self._prepared is not None and learner.has_learnt:
            self._prepared.keep(learner.learnt())
        self.told_to_end()
        if self._lanes.stop(timeout) and self._engine is not None:
            self._engine.close()
