"""Checks what audits found while serving: answers that depend on their batch."""

from __future__ import annotations

from collections.abc import Iterator

import redis

from inferq.shared.names import Names
from inferq.workers.doctor.finding import Finding, ok, warning
from inferq.workers.metrics.published import read_stats


def audits(client: redis.Redis, names: Names) -> Iterator[Finding]:
    """One line for each model and worker with a mismatch, or one line if there is none.

    Raises redis' errors.
    """
    done = 0
    wrong = False
    for worker in read_stats(client, names):
        for model in worker.models:
            done += sum(model.audits.values())
            if model.mismatch is None:
                continue
            wrong = True
            goes_on = "runs request by request now" if model.unbatched else "goes on in batches"
            yield warning(
                f"model {model.model}",
                f"on {worker.node}: {model.mismatch}; it {goes_on}",
                "write batchable = false into its model.toml",
            )
    if done and not wrong:
        yield ok("audits", f"{done} answers looked at again; none depended on its batch")
