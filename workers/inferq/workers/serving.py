"""One model as a worker serves it: its engine, lanes, waiting requests and knobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from inferq.shared.errors import ConfigError
from inferq.shared.names import Names
from inferq.shared.schema import ModelAdvert
from inferq.workers.batching.padding import Padding
from inferq.workers.batching.policy import Knobs, Leave, Wait, decide
from inferq.workers.batching.waiting import Waiting, WaitingRequests
from inferq.workers.clock import RedisClock
from inferq.workers.engines import engine_class
from inferq.workers.engines.base import Engine, EngineOptions
from inferq.workers.intake import Failed, Intake, Revoked
from inferq.workers.lanes import Finished, Job, LaneThread
from inferq.workers.repository import ModelSpec
from inferq.workers.results import Results
from inferq.workers.tuning import Tuning, measure, sizes

logger = logging.getLogger(__name__)

#: How much the newest request weighs in the mean rows per request.
_ROWS_WEIGHT = 0.1
#: Seconds: lanes whose batches take less are fed between round trips only, which is cheaper.
SLOW_BATCH_S = 1e-3
#: Most requests that one claim asks for.
MAX_CLAIM = 1024


class ServedModel:
    """Owned by the data plane's thread once `load` has returned."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.waiting = WaitingRequests()
        self.lanes: list[LaneThread] = []
        self._free: list[LaneThread] = []
        self._rows_per_request = 1.0
        self._engine: Engine | None = None
        #: False while ``control cancel_consumer`` holds: nothing is claimed.
        self.consuming = True
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
    ) -> None:
        """Load the engine, warm it up, start the lanes' threads. ConfigError if it cannot be."""
        spec = self.spec
        config = spec.config
        engine = engine_class(config.engine)(
            spec.path,
            EngineOptions(config.lanes, spec.max_batch_size, config.buckets, spec.engine_table),
        )
        began = time.monotonic()
        engine.load()
        self._engine = engine
        tuning = self._tune(engine)
        #: True if a batch takes so long that a lane must not wait for a round trip to Redis.
        self.slow = tuning is None or tuning.best * tuning.seconds_per_row > SLOW_BATCH_S
        preferred = config.preferred_batch_sizes
        if not preferred and tuning is not None and spec.batchable:
            preferred = (tuning.best,)
        self.knobs = Knobs(
            max_batch_size=spec.max_batch_size,
            preferred_batch_sizes=preferred,
            max_queue_delay_ms=config.max_queue_delay_ms,
            buckets=config.buckets,
            batchable=spec.batchable,
            spread=engine.parallel_lanes,
        )
        self.advert: ModelAdvert = spec.advert(
            seconds_per_row=tuning.seconds_per_row if tuning else 0.0,
            result_expires_s=result_expires_s,
        )
        padding = Padding(spec.signature, config.pad)
        self.intake = Intake(self.advert, names, padding, is_revoked, clock.now)
        self.results = Results(worker, config.engine, spec.version, padding)
        self.lanes = [
            LaneThread(f"inferq-{self.name}-{n}", lane, self.knobs, on_finished)
            for n, lane in enumerate(engine.lanes)
        ]
        self._free = list(self.lanes)
        for lane in self.lanes:
            lane.start()
        logger.info(
            "model %s version %d: %s, %d lanes, batches of %d, ready in %.1f s",
            self.name, spec.version, config.engine, len(self.lanes), self.knobs.target,
            time.monotonic() - began,
        )  # fmt: skip

    def _tune(self, engine: Engine) -> Tuning | None:
        config = self.spec.config
        if not config.warm_up:
            return None
        tried = [1]
        if self.spec.batchable:
            tried = sizes(self.spec.max_batch_size, config.buckets)
        try:
            return measure(engine.lanes, self.spec.signature, tried, dict(config.pad))
        except Exception as problem:
            raise ConfigError(
                f"{self.spec.path or self.name} cannot run zeros to warm up "
                f"(warm_up = false serves it without): {problem}"
            ) from problem

    # --- claiming ---------------------------------------------------------------------------

    def room(self, step: int) -> int:
        """How many more requests of priority `step` to claim: one formed batch per lane may wait.

        Less urgent ones that wait already do not count: an urgent request is always let in.
        """
        rows = len(self.lanes) * self.knobs.target - self.waiting.rows_ahead(step)
        return min(MAX_CLAIM, max(0, -int(-rows // self._rows_per_request)))

    def add(self, item: Waiting) -> None:
        self.waiting.add(item)
        self._rows_per_request += _ROWS_WEIGHT * (item.rows - self._rows_per_request)

    # --- forming ----------------------------------------------------------------------------

    def form(self, now_ms: float) -> Iterator[tuple[LaneThread, Job] | Failed | Revoked]:
        """The batches that leave now, each with its lane, and requests that came too late."""
        while True:
            decision = decide(self.waiting.items, len(self._free), now_ms, self.knobs)
            self.due_ms = decision.until_ms if isinstance(decision, Wait) else None
            if not isinstance(decision, Leave):
                return
            taken = self.waiting.take(decision)
            items: list[Waiting] = []
            for item in taken:
                late = self.intake.too_late(item.slot, item.ticket)
                if late is None:
                    items.append(item)
                else:
                    yield late
            if items:
                rows = sum(item.rows for item in items)
                yield self._free.pop(), Job(items, rows, self.knobs.bucket(rows), now_ms)

    def freed(self, lane: LaneThread) -> None:
        """`lane` has finished its batch."""
        lane.job = None
        self._free.append(lane)

    def jobs(self) -> list[Job]:
        """The batches that are computing. Safe to call from any thread."""
        return [job for lane in list(self.lanes) if (job := lane.job) is not None]

    def overdue(self) -> bool:
        """Whether a batch has been computing for longer than max_run_seconds."""
        limit = self.spec.config.max_run_seconds * 1000
        now = time.monotonic() * 1000
        return any(now - job.formed_ms > limit for job in self.jobs())

    def close(self, timeout: float) -> None:
        """End the lanes and free the engine, unless a lane does not end in time."""
        deadline = time.monotonic() + timeout
        ended = [lane.stop(max(0.0, deadline - time.monotonic())) for lane in self.lanes]
        if self._engine is not None and all(ended):
            self._engine.close()
