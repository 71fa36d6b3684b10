"""Loaded by the workers' Python at its start: writes down each request that an engine begins.

One file per process under ``CHAOS_RUNS``, one line per request: producer and number. A line is
written at once and by one call, so that it outlives a SIGKILL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from inferq.shared.schema import Array
from inferq.workers.engines.fake import FakeLane
from inferq.workers.models.engine import Batch

FOLDER = os.environ.get("CHAOS_RUNS")


def _write_down() -> None:
    path = f"{FOLDER}/{os.getpid()}.runs"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    run = FakeLane.run

    def written(self: FakeLane, batch: Batch) -> Mapping[str, Array]:
        first = next(iter(batch.parts[0]))
        begun = [f"{int(part[first][0, 1])} {int(part[first][0, 2])}\n" for part in batch.parts]
        os.write(file, "".join(begun).encode())
        return run(self, batch)

    FakeLane.run = written  # type: ignore[method-assign]


if FOLDER:
    _write_down()
