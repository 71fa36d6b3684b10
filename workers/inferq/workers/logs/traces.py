"""Formats tracebacks so that texts of clients cannot begin a line.

An exception's text often quotes what a client wrote, with line breaks and escape codes. Here each
exception's text is one line. The lines of the stack, which come from files, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from traceback import TracebackException
from types import TracebackType
from typing import Final

from inferq.workers.logs.printing import plain

#: Longest text of one exception, in characters, and most exceptions of one traceback.
MAX_TEXT: Final = 4_000
MAX_EXCEPTIONS: Final = 10
_CAUSED: Final = "\nThe above exception was the direct cause of the following exception:\n\n"
_DURING: Final = "\nDuring handling of the above exception, another exception occurred:\n\n"
_WITHIN: Final = "\nThe above exception group holds this one:\n\n"

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def format_traceback(exc_info: ExcInfo) -> str:
    """The traceback as logging's own formatter writes it, except for the exceptions' texts."""
    kind, problem, trace = exc_info
    if kind is None or problem is None:
        return "NoneType: None"
    found = TracebackException(kind, problem, trace, compact=True)
    return "".join(_parts(found)).rstrip("\n")


def _parts(last: TracebackException) -> Iterator[str]:
    chain: list[tuple[str, TracebackException]] = []
    found: TracebackException | None = last
    joint = ""
    while found is not None and len(chain) < MAX_EXCEPTIONS:
        chain.append((joint, found))
        cause = found.__cause__
        joint = _CAUSED if cause is not None else _DURING
        found = cause if cause is not None or found.__suppress_context__ else found.__context__
    for before, each in reversed(chain):
        if each.stack:
            yield "Traceback (most recent call last):\n"
            yield from each.stack.format()
        yield f"{_one_line(each)}\n{before}"
    for each in (last.exceptions or [])[:MAX_EXCEPTIONS]:
        yield f"{_WITHIN}{_one_line(each)}\n"


def _one_line(found: TracebackException) -> str:
    try:
        text = "".join(found.format_exception_only()).rstrip("\n")
    except Exception as problem:  # noqa: BLE001 - another library's exception whose text fails
        text = f"an exception that cannot be told: {type(problem).__name__}"
    text = plain(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
