"""What user code prints and logs becomes lines of its worker's log, with model and lane.

Both arrive over one pipe, the process' stdout and stderr. A line of Python's logging is marked, so
that it keeps its level and its logger; any other is what somebody printed, and has the level INFO.
Floods are limited as all lines of a worker are (`logs.flood`), for each model and level.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, Final, TextIO

from inferq.workers.logs.fields import about

logger = logging.getLogger("inferq.user_code")

#: Of one line; the rest is left out.
MAX_LINE_BYTES: Final = 16_000
_MARK: Final = "\x1e"
_CHUNK: Final = 1 << 16


class Marked(logging.StreamHandler[TextIO]):
    """In the process: each record on one marked line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)  # with its traceback
        if len(text) > MAX_LINE_BYTES // 2:  # a character may take several bytes
            text = text[: MAX_LINE_BYTES // 2] + "…"
        return _MARK + json.dumps([record.levelno, record.name[:100], text])


class Reader:
    """In the worker: logs what arrives at `pipe`, until nobody can write to it any more."""

    def __init__(self, pipe: int, model: str, lane: int | None) -> None:
        self._pipe = pipe
        self._name = f"model {model}" if lane is None else f"model {model}, lane {lane}"
        told = {} if lane is None else {"lane": lane}
        self._extra: Mapping[str, Any] = about(model=model, **told)
        self._thread = threading.Thread(
            target=self._read, name=f"inferq-{model}-log-{lane}", daemon=True
        )

    def start(self) -> None:
        """It ends by itself."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait until all was logged that there is."""
        self._thread.join(timeout)

    def _read(self) -> None:
        begun, skipping = b"", False
        try:
            while chunk := os.read(self._pipe, _CHUNK):
                *lines, begun = (begun + chunk).split(b"\n")
                for line in lines:
                    if not skipping:
                        self._tell(line)
                    skipping = False
                if len(begun) > MAX_LINE_BYTES:
                    if not skipping:
                        self._tell(begun)
                    begun, skipping = b"", True
            if not skipping:
                self._tell(begun)
        finally:
            os.close(self._pipe)

    def _tell(self, line: bytes) -> None:
        text = line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if not text:
            return
        level, name = logging.INFO, ""
        if text.startswith(_MARK):
            level, name, text = _unmarked(text)
        if name:
            logger.log(level, "%s: %s: %s", self._name, name, text, extra=self._extra)
        else:
            logger.log(level, "%s: %s", self._name, text, extra=self._extra)


def _unmarked(text: str) -> tuple[int, str, str]:
    """Level, logger and text of a marked line, or of what only looks like one."""
    try:
        level, name, said = json.loads(text[len(_MARK) :])
    except ValueError:
        return logging.INFO, "", text
    if type(level) is int and isinstance(name, str) and isinstance(said, str):
        return min(max(level, logging.DEBUG), logging.CRITICAL), name, said
    return logging.INFO, "", text
