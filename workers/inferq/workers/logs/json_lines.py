"""Log records as JSON: one object a line, of bounded length, in ASCII."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from inferq.workers.logs.fields import FIELDS

#: Most bytes of a line: Docker's log drivers split longer ones.
MAX_LINE: Final = 16_000
#: Most bytes of each part of it.
MAX_MESSAGE: Final = 3_000
MAX_EXCEPTION: Final = 7_000
MAX_FIELD: Final = 150
#: Enough for MAX_IDS ids that are UUIDs.
MAX_LIST: Final = 1_400
MAX_NAME: Final = 250


class JsonLines(logging.Formatter):
    """`node`: the Celery node name of lines that name no other."""

    def __init__(self, node: str = "") -> None:
        super().__init__()
        self.node = node

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": fit(record.name, MAX_NAME),
            "message": fit(_message(record), MAX_MESSAGE),
            "node": fit(str(getattr(record, "node", self.node)), MAX_NAME),
        }
        for field in FIELDS:
            value = getattr(record, field, None)
            if value is not None:
                told[field] = _bounded(value)
        task_id = _task_id(record)
        if task_id is not None:
            told.setdefault("request_ids", [fit(task_id, MAX_FIELD)])
        if record.exc_info:
            told["exception"] = fit(self.formatException(record.exc_info), MAX_EXCEPTION)
        elif record.exc_text:
            told["exception"] = fit(record.exc_text, MAX_EXCEPTION)
        return json.dumps(told)


def fit(text: str, most: int) -> str:
    """`text`, without its middle if it takes more than `most` (at least 100) bytes in JSON."""
    if len(text) <= most and _size(text) <= most:
        return text
    half = (most - 50) // 2  # the note about the middle takes less than 50
    head = _head(text[:half], half)
    tail = _head(text[: -half - 1 : -1], half)[::-1]
    return f"{head} […{len(text) - len(head) - len(tail)} characters…] {tail}"


def _head(text: str, room: int) -> str:
    while (size := _size(text)) > room:
        text = text[: min(len(text) * room // size, len(text) - 1)]
    return text


def _size(text: str) -> int:
    return len(json.dumps(text))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as problem:  # noqa: BLE001 - another library's arguments that do not fit its text
        return f"{record.msg!r} cannot be filled in: {problem!r}"


def _task_id(record: logging.LogRecord) -> str | None:
    """The id of the Celery task that one of Celery's own lines is about."""
    data = getattr(record, "data", None)
    task_id = data.get("id") if isinstance(data, dict) else getattr(record, "task_id", None)
    return task_id if isinstance(task_id, str) and task_id != "???" else None


def _bounded(value: object) -> object:
    if isinstance(value, list | tuple):
        kept: list[str] = []
        size = 0
        for each in value:
            text = fit(str(each), MAX_FIELD)
            size += _size(text) + 2
            if size > MAX_LIST:
                break
            kept.append(text)
        return kept
    if isinstance(value, bool | int | float):
        return value
    return fit(str(value), MAX_FIELD)
