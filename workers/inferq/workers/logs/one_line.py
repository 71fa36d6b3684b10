"""Keeps text of clients from looking like a log line of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from inferq.workers.logs import traces
from inferq.workers.logs.printing import plain


class OneLine(logging.Filter):
    """Escapes line breaks and control characters in what is filled into a line's text.

    Also in the texts of the exceptions of its traceback. The line's own text, and the stack, keep
    their line breaks.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if isinstance(args, Mapping):
            record.args = {key: _harmless(value) for key, value in args.items()}
        elif args:
            record.args = tuple(map(_harmless, args))
        if record.exc_info and not record.exc_text:
            record.exc_text = traces.format_traceback(record.exc_info)  # formatters use it as it is
        return True


def _harmless(value: object) -> object:
    if isinstance(value, int | float):
        return value
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - logging reports it itself when it fills in the text
        return value
    return value if text.isprintable() else plain(text)
