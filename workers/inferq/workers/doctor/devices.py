"""Check of what models run on: a worker that is pinned to a GPU may have none that it can use."""

from __future__ import annotations

from collections.abc import Iterator

import redis

from inferq.shared.names import Names
from inferq.workers.doctor.finding import Finding, warning
from inferq.workers.metrics.published import read_stats
from inferq.workers.models.off_gpu import lacking


def devices(client: redis.Redis, names: Names) -> Iterator[Finding]:
    """One line for each model that runs on the CPU of a worker with a GPU. Raises redis' errors."""
    for worker in read_stats(client, names):
        for model in worker.models:
            if model.off_gpu:
                yield warning(
                    f"model {model.model}",
                    f"runs on the CPU of {worker.node}, which is pinned to {worker.device}",
                    f"see to {lacking(model.engine)}",
                )
