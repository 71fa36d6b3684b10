"""Worker side of celery-batches: the task is called with up to `flush_every` requests."""

from __future__ import annotations

import os
from typing import Any

from celery_batches import Batches

from benchmarks.stock import ECHO_TASK, SIZE_VARIABLE, URL_VARIABLE, echo, make_app

app = make_app("benchmarks.batches", os.environ[URL_VARIABLE])
# A worker may never hold less than one batch, or it would wait for its flush timer.
app.conf.worker_prefetch_multiplier = 4 * int(os.environ[SIZE_VARIABLE])


@app.task(  # type: ignore[untyped-decorator]
    name=ECHO_TASK, base=Batches, flush_every=int(os.environ[SIZE_VARIABLE]), flush_interval=0.01
)
def echo_batch(requests: list[Any]) -> None:
    """Answer every request of one batch."""
    for request in requests:
        app.backend.mark_as_done(request.id, echo(request.args[0]), request=request)
