"""The line that a worker writes of each batch at DEBUG."""

from __future__ import annotations

import logging

from inferq.workers.claims.runs import Finished
from inferq.workers.logs.fields import about, few


def tell(logger: logging.Logger, model: str, finished: Finished) -> None:
    """One DEBUG line about a batch that has ended: what it held, how long it took, who failed."""
    outcomes = finished.outcomes
    # A batch that failed was run again in parts.
    runs = {run.started_ms: run for outcome in outcomes if (run := outcome.run) is not None}
    failed = [each.item.ticket.id for each in outcomes if each.error is not None]
    late = [each.ticket.id for each in finished.late]
    rows = sum(run.rows for run in runs.values())
    padding = sum(run.padding for run in runs.values())
    ms = round((finished.ended - finished.began) * 1000, 3)
    logger.debug(
        "batch of %s on lane %d: %d requests, %d rows and %d of padding in %d runs, %.1f ms; "
        "%d failed, %d too late",
        model, finished.lane, len(outcomes), rows, padding, len(runs), ms, len(failed), len(late),
        extra=about(
            *(item.ticket.id for item in finished.job.items), model=model, lane=finished.lane,
            rows=rows, requests=len(outcomes), padding=padding,
            bucket=max((run.rows + run.padding for run in runs.values()), default=0),
            runs=len(runs), ms=ms, failed_ids=few(failed), late_ids=few(late),
        ),
    )  # fmt: skip
