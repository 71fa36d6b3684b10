"""Limits repeated log lines, so that many bad requests do not fill a worker's log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

#: Lines of one kind that are written within WINDOW_S; the next one says how many were left out.
BURST: Final = 20
WINDOW_S: Final = 10.0
#: Most kinds that are counted; there are more only if some code puts data into the text itself.
MAX_KINDS: Final = 256


class Flood(logging.Filter):
    """Lets BURST lines of a kind (text before it is filled in, level, model) pass in WINDOW_S.

    All DEBUG lines pass: who turns DEBUG on wants them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        #: Kind → when its window began, and its lines since.
        self._seen: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return True
        kind = (str(record.msg), record.levelno, getattr(record, "model", None))
        now = self._clock()
        with self._lock:
            began, count = self._seen.pop(kind, (now, 0))
            left_out = 0
            if now - began >= WINDOW_S:
                left_out = max(0, count - BURST)
                began, count = now, 0
            self._seen[kind] = began, count + 1
            if len(self._seen) > MAX_KINDS:
                del self._seen[next(iter(self._seen))]
        if count >= BURST:
            return False
        if left_out:
            record.msg = f"{record.getMessage()} (and {left_out} more like it before)"
            record.args = ()
            record.left_out = left_out
        return True
