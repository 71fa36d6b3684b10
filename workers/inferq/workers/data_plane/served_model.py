"""One model as a worker serves it: its lanes, its waiting requests, and its formed batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from inferq.shared.schema import ModelAdvert
from inferq.workers.audit.audit import Audit
from inferq.workers.batching.policy import Leave, Wait, decide
from inferq.workers.batching.waiting import Waiting, WaitingRequests, rows_by_priority
from inferq.workers.claims.runs import Finished, Job
from inferq.workers.data_plane.budget import Sizes
from inferq.workers.data_plane.counts import ModelCounts
from inferq.workers.data_plane.intake import Intake
from inferq.workers.data_plane.lanes import Lanes
from inferq.workers.data_plane.results import Results
from inferq.workers.data_plane.target import Target
from inferq.workers.models.engine import LoadedModel
from inferq.workers.warmup.prepare import Prepared

#: Weight of the newest request in the mean rows per request.
_ROWS_WEIGHT = 0.1
#: Most requests that one claim asks for.
MAX_CLAIM = 1024
#: For each lane one batch is formed ahead, or as many as it computes in AHEAD_S, but never more
#: than the second number. Where batches are short, claiming and settling each by itself takes most
#: of a request's time.
AHEAD_S = 0.02
MAX_AHEAD = 16
#: Weight of the newest batch in the mean time of a batch, if it was a short one.
_BATCH_WEIGHT = 0.1


class ServedModel:
    """Owned by the data plane's thread. `loading` makes it, with its lanes started."""

    def __init__(
        self,
        loaded: LoadedModel,
        prepared: Prepared,
        lanes: Lanes,
        target: Target,
        *,
        advert: ModelAdvert,
        intake: Intake,
        results: Results,
        counts: ModelCounts,
        audit: Audit,
        steps: Sequence[int],
    ) -> None:
        """`steps`: the priority steps of its queue."""
        self.spec = loaded.spec
        self.name = loaded.spec.name
        self.advert = advert
        self.intake = intake
        self.results = results
        self.sizes = Sizes(advert)
        #: The batch size to aim at.
        self.target = target
        #: Counts of its requests since the start.
        self.counts = counts
        self.audit = audit
        #: False while ``control cancel_consumer`` holds: nothing is claimed.
        self.consuming = True
        #: Rows of the largest batch that is formed.
        self.max_rows = prepared.rows
        #: What is lacking for it to run on the GPU that the worker is pinned to; empty: nothing.
        self.off_gpu = ""
        self.waiting = WaitingRequests()
        #: Batches that were formed and have not ended, in order. Lanes compute the first of them;
        #: the others wait.
        self.jobs: list[Job] = []
        #: Monotonic ms at which waiting requests may leave; None: only when something changes.
        self.due_mono_ms: float | None = None
        self._loaded = loaded
        self._prepared = prepared
        self._lanes = lanes
        self._steps = steps
        #: Seconds that a batch takes, rather over- than underestimated; 0: not known.
        self._batch_s = 0.0
        self._rows_per_request = 1.0

    # --- claiming ---------------------------------------------------------------------------

    def room(self) -> dict[int, int]:
        """Priority step → how many more requests of it to claim, to form batches ahead.

        Less urgent requests that wait already do not count: there is always room for an urgent one.
        """
        held = self.waiting.rows.copy()
        for job in self.jobs[len(self._lanes) :]:
            for priority, count in job.rows.items():
                held[priority] = held.get(priority, 0) + count
        rows = len(self._lanes) * self._depth * self.target.size
        room: dict[int, int] = {}
        for step in self._steps:
            rows -= held.get(step, 0)
            room[step] = min(MAX_CLAIM, max(0, -int(-rows // self._rows_per_request)))
        return room

    def add(self, item: Waiting) -> None:
        self.waiting.add(item)
        self._rows_per_request += _ROWS_WEIGHT * (item.rows - self._rows_per_request)

    # --- forming ----------------------------------------------------------------------------

    def form(self, now_mono_ms: float) -> Iterator[Job]:
        """The batches to `put` now; none while the first in line is a suspect."""
        while (decision := self._decide(now_mono_ms)) is not None:
            yield self._form(decision)

    def is_suspect_first(self) -> bool:
        """Whether the first in line may have ended a worker: it must run alone."""
        return bool(self.waiting) and self.waiting.items[0].alone

    def form_alone(self) -> Job:
        """The suspect's own batch."""
        return self._form(Leave((0,), self.waiting.items[0].rows, 0))

    def _form(self, decision: Leave) -> Job:
        items = self.waiting.take(decision)
        job = Job(items, rows_by_priority(items))
        self.jobs.append(job)
        return job

    def _decide(self, now_mono_ms: float) -> Leave | None:
        """The next batch for a free lane or, once all compute, the next full one for whichever
        lane is free first: requests that still lack company keep the chance to find it.
        """
        if self.is_suspect_first():
            return None
        free = len(self._lanes) - len(self.jobs)
        if free > 0:
            decision = decide(self.waiting.items, free, now_mono_ms, self.target.knobs)
            self.due_mono_ms = decision.until_mono_ms if isinstance(decision, Wait) else None
        else:
            self.due_mono_ms = None
            if -free >= len(self._lanes) * self._depth:
                return None
            items = self.waiting.items
            decision = decide(items, 1, now_mono_ms, self.target.ahead)
            if (
                isinstance(decision, Leave)
                and items[decision.take[0]].ticket.priority > items[0].ticket.priority
            ):  # or it would be computed before the more urgent ones that lack company
                return None
        return decision if isinstance(decision, Leave) else None

    @property
    def _depth(self) -> int:
        """Batches that may be formed ahead for each lane."""
        if not self._batch_s:
            return 1
        return max(1, min(MAX_AHEAD, math.ceil(AHEAD_S / self._batch_s)))

    def has_enough_ahead(self) -> bool:
        """Whether so many batches wait for the lanes that claiming and settling may wait."""
        return len(self.jobs) - len(self._lanes) >= self._lanes.enough_ahead

    def runs_ahead(self) -> bool:
        """Whether batches are short and some wait for lanes.

        Then lanes need not report each end.
        """
        return self._lanes.enough_ahead < math.inf and len(self.jobs) > len(self._lanes)

    def least_urgent(self) -> int:
        """The least urgent priority in the batches that were formed."""
        return max(job.items[-1].ticket.priority for job in self.jobs)

    def put(self, job: Job) -> None:
        """Have the lanes compute a formed batch."""
        self._lanes.put(job)

    def recall(self) -> list[Waiting]:
        """Make requests of batches that no lane has begun wait again; returns them."""
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
        """A lane has ended `job`; without `took_s`: no lane will ever begin it."""
        self.jobs.remove(job)
        if took_s is not None:
            smoothed = self._batch_s + _BATCH_WEIGHT * (took_s - self._batch_s)
            self._batch_s = max(took_s, smoothed)
            lanes, depth = len(self._lanes), self._depth
            self._lanes.enough_ahead = max(lanes, lanes * depth // 4) if depth > 1 else math.inf
        if self.audit.unbatched and self.target.knobs.batchable:
            self.target.unbatch()

    def learn(self, finished: Finished) -> None:
        """Refine the target size by how long this batch took, if all lanes were busy."""
        self.target.learn(finished, busy=len(self.jobs) >= len(self._lanes))

    # --- for any thread ---------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        """How many there are."""
        return len(self._lanes)

    @property
    def target_rows(self) -> int:
        """Rows that a batch aims at."""
        return self.target.size

    def computing(self) -> list[tuple[Job, float]]:
        """The batches that lanes have begun, and when (monotonic ms)."""
        return self._lanes.computing()

    def reserved(self) -> list[Waiting]:
        """The requests that are claimed and that no lane has begun."""
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
        """Whether a lane's thread is alive."""
        return self._lanes.is_alive

    def stop_blaming(self) -> None:
        """Note that if this process ends from now on, no batch caused it."""
        self._prepared.stop_blaming()

    def close(self, timeout: float, *, free: bool = True) -> None:
        """End the lanes and free the model, unless a lane does not end in time. `free` is False
        where an engine is beyond use: what would free meets the same error, and may not return.
        """
        self.target.keep()
        self.stop_blaming()
        if self._lanes.stop(timeout) and free:
            self._loaded.close()
