"""Keeps what clients write from looking like a log line of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from inferq.workers.printing import plain


class OneLine(logging.Filter):
    """Escapes line breaks and control characters in what is filled into a line's text.

    The text itself keeps those that it has, and so does a traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if isinstance(args, Mapping):
            record.args = {key: _harmless(value) for key, value in args.items()}
        elif args:
            record.args = tuple(map(_harmless, args))
        return True


def _harmless(value: object) -> object:
    if isinstance(value, int | float):
        return value
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - logging says so itself when it fills in the text
        return value
    return value if text.isprintable() else plain(text)
