"""What user code prints and logs becomes lines of its worker's log, with model and lane.

Both arrive over one pipe, the process' stdout and stderr. A line of Python's logging begins with a
mark, which nobody who has something printed can guess, so that it keeps its level, its logger and
its traceback; any other is what somebody printed, and has the level INFO. Floods are limited as all
lines of a worker are (`logs.flood`), for each model and level.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, Final, TextIO

from inferq.workers.logs import traces
from inferq.workers.logs.fields import about

logger = logging.getLogger("inferq.user_code")

#: Two kinds of lines: however many one of them has, the other is not left out.
_SAID: Final = "%s: %s"
_TOLD: Final = "%s, %s"
#: Of one line; the rest is left out.
MAX_LINE_BYTES: Final = 64_000
#: Of a record's text, and of its traceback. In JSON a character takes up to six bytes.
_MAX_TEXT: Final = 4_000
_CHUNK: Final = 1 << 16


class Marked(logging.StreamHandler[TextIO]):
    """In the process: each record on one line that begins with `mark`, once that is known."""

    mark = ""

    def format(self, record: logging.LogRecord) -> str:
        text = _cut(record.getMessage())
        trace = _cut(traces.format_traceback(record.exc_info)) if record.exc_info else ""
        if not self.mark:
            return text
        return self.mark + json.dumps([record.levelno, record.name[:100], text, trace])


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


class Reader:
    """In the worker: logs what arrives at `pipe`, until nobody can write to it any more."""

    def __init__(self, pipe: int, mark: str, model: str, lane: int | None) -> None:
        self._pipe = pipe
        self._mark = mark
        self._model, self._lane = model, lane
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
        if text.startswith(self._mark):
            try:
                level, name, said, trace = json.loads(text[len(self._mark) :])
            except ValueError:  # cut off as the process ended
                return
            _log(level, _SAID, f"{name}: {said}", self._model, self._lane, trace)
        else:
            _log(logging.INFO, _SAID, text, self._model, self._lane)


def tell(text: str, model: str, lane: int, trace: str = "") -> None:
    """An error of user code, in the worker's log; `trace`: as `traces.format_traceback` has it."""
    _log(logging.ERROR, _TOLD, text, model, lane, trace)


def _log(level: int, form: str, text: str, model: str, lane: int | None, trace: str = "") -> None:
    if not logger.isEnabledFor(level):
        return
    where = f"model {model}" if lane is None else f"model {model}, lane {lane}"
    told: Mapping[str, Any] = {} if lane is None else {"lane": lane}
    record = logger.makeRecord(
        logger.name, level, "", 0, form, (where, text), None, extra=about(model=model, **told)
    )
    record.exc_text = trace or None
    logger.handle(record)
