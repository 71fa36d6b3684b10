"""A worker's lines at DEBUG: one for each batch, and one for each request that is not computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from inferq.shared.errors import DeadLettered, NotRegistered
from inferq.workers.claims.runs import Finished
from inferq.workers.claims.verdicts import Failed, Revoked
from inferq.workers.data_plane.observers import Observer
from inferq.workers.logs.fields import about, few

logger = logging.getLogger(__name__)


class BatchLog(Observer):
    """Costs nothing above DEBUG."""

    def refused(self, ended: Sequence[Failed | Revoked]) -> None:
        if not logger.isEnabledFor(logging.DEBUG):
            return
        for each in ended:
            ticket = each.ticket
            if isinstance(each, Revoked):
                told = about(ticket.id, model=ticket.model)
                logger.debug("%s is %s", ticket.id, each.reason, extra=told)
            elif not isinstance(
                each.error, NotRegistered | DeadLettered
            ):  # these have a line of their own
                told = about(ticket.id, model=ticket.model, error=each.error.code)
                logger.debug("refused %s: %s", ticket.id, each.error.message, extra=told)

    def finished(self, finished: Finished) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            _tell(finished)


def _tell(finished: Finished) -> None:
    """Log what a batch held, how long it took, and how many requests failed."""
    model, outcomes = finished.job.model, finished.outcomes
    # A batch that failed was run again in parts.
    runs = {run.started_mono_ms: run for outcome in outcomes if (run := outcome.run) is not None}
    failed = [each.item.ticket.id for each in outcomes if each.error is not None]
    late = [each.ticket.id for each in finished.late]
    rows = sum(run.rows for run in runs.values())
    padding = sum(run.padding for run in runs.values())
    ms = round((finished.ended - finished.began) * 1000, 3)
    logger.debug(
        "batch of %s on lane %d: %d requests, %d rows and %d of padding in %d runs, %.1f ms; "
        "%d failed, %d too late",
        model,
        finished.lane,
        len(outcomes),
        rows,
        padding,
        len(runs),
        ms,
        len(failed),
        len(late),
        extra=about(
            *(item.ticket.id for item in finished.job.items),
            model=model,
            lane=finished.lane,
            rows=rows,
            requests=len(outcomes),
            padding=padding,
            bucket=max((run.rows + run.padding for run in runs.values()), default=0),
            runs=len(runs),
            ms=ms,
            failed_ids=few(failed),
            late_ids=few(late),
        ),
    )
