"""Worker side of plain Celery: one request, one task call."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.stock import ECHO_TASK, URL_VARIABLE, Wire, echo, make_app

app = make_app("benchmarks.plain", os.environ[URL_VARIABLE])


@app.task(name=ECHO_TASK)  # type: ignore[untyped-decorator]
def echo_one(tensor: Wire) -> dict[str, Any]:
    """Answer one request."""
    return echo(tensor)
