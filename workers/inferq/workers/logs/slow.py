"""Logs that something takes long while it still runs, so that who waits knows for what."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from inferq.workers.logs.fields import about

#: Seconds after which it is logged.
SLOW_S: Final = 10.0


@contextmanager
def warn_if_slow(logger: logging.Logger, model: str, what: str) -> Iterator[None]:
    """Log one line if `what` of `model` has taken `SLOW_S` seconds in this context and goes on."""
    timer = threading.Timer(
        SLOW_S,
        logger.warning,
        ["model %s: %s has taken %g s so far, and goes on", model, what, SLOW_S],
        {"extra": about(model=model)},
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
