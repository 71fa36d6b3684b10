"""What a worker reports of one model: numbers, and words for people. For any thread."""

from __future__ import annotations

from typing import Protocol

from inferq.workers.audit.audit import Audit
from inferq.workers.audit.evidence import Result
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Job
from inferq.workers.data_plane.counts import ModelCounts, ModelStats
from inferq.workers.models.spec import ModelSpec


class Reported(Protocol):
    """A model, loaded or not."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def counts(self) -> ModelCounts: ...
    @property
    def audit(self) -> Audit | None:
        """None: it is not loaded."""

    @property
    def off_gpu(self) -> str:
        """What it lacks to run on its worker's GPU; empty: nothing."""

    @property
    def lanes(self) -> int: ...
    @property
    def max_rows(self) -> int:
        """Rows of the largest batch that is formed."""

    @property
    def target_rows(self) -> int:
        """Rows that a batch aims at."""

    def computing(self) -> list[tuple[Job, float]]:
        """The batches that lanes have begun, and when (monotonic ms)."""

    def reserved(self) -> list[Waiting]:
        """The requests that are claimed and that no lane has begun."""


def fill(model: Reported) -> str:
    """How full its batches were so far: ``5.2 of 8 rows``."""
    batches, rows = model.counts.batches, model.counts.rows
    return f"{rows / batches:.1f} of {model.target_rows} rows" if batches else "no batch yet"


def audits(model: Reported) -> str:
    """What its audits have found: ``12 of 12 answers as alone``."""
    return "none yet" if model.audit is None else model.audit.summary()


def stats(model: Reported) -> ModelStats:
    """What has become of its requests so far, and how many it has now."""
    computing, spec, audit = model.computing(), model.spec, model.audit
    found = model.counts.stats(spec.name, spec.version, spec.config.engine)
    found.lanes, found.max_batch_size = model.lanes, model.max_rows
    found.target_batch_size = model.target_rows
    found.lanes_busy = len(computing)
    found.computing = sum(len(job.items) for job, _ in computing)
    found.waiting = len(model.reserved())
    found.off_gpu = bool(model.off_gpu)
    results = dict.fromkeys(Result, 0) if audit is None else audit.results
    found.audits = {result.value: count for result, count in results.items()}
    if audit is not None:
        found.audit_s, found.mismatch = audit.took_s, audit.mismatch
        found.unbatched = audit.unbatched
    return found
