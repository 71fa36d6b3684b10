"""How a process ends in which a thread still loads a model, or a lane computes: at once.

Python ends such a thread wherever it happens to be, and PyCUDA aborts a process whose thread ends
with a context pushed: a worker that was told to stop would look like one that crashed. So ends one
whose engine is beyond use, too: libraries of CUDA's may abort, or wait for ever, as they free.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_asked: Final[list[tuple[Callable[[], bool], Callable[[], int]]]] = []


def end_at_once(busy: Callable[[], bool], status: Callable[[], int]) -> None:
    """If `busy()` still at exit, end with `status()` once what registered itself later has run."""
    _asked.append((busy, status))


def _end() -> None:
    for busy, status in _asked:
        if busy():
            for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
                with suppress(Exception):
                    flush()
            os._exit(status())


# Now, not when it is asked for: what runs at exit runs in reverse order.
atexit.register(_end)
