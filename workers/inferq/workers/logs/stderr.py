"""Makes what Python writes to a process' stderr JSON lines.

What C and C++ libraries write to file descriptor 2 stays as it is.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from inferq.workers.logs.json_lines import JsonLines

logger = logging.getLogger("inferq")


def write_json(formatter: JsonLines, node: str) -> None:
    """Log lines, warnings, uncaught exceptions and prints to stderr are JSON from now on.

    `node`: the node of lines that name no other.
    """
    formatter.node = node
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    logging.captureWarnings(True)
    sys.excepthook = _on_uncaught
    threading.excepthook = _on_uncaught_in_thread
    sys.unraisablehook = _on_unraisable
    sys.stderr = Lines(logging.getLogger("stderr").error)


class Lines(io.TextIOBase):
    """A text stream that passes each line written to it to `tell`; several at once go as one."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell
        #: The line that each thread has begun, and whether it is in `tell`.
        self._own = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"expected str, not {type(text).__name__}")
        begun: str = getattr(self._own, "begun", "") + text
        whole, newline, self._own.begun = begun.rpartition("\n")
        # What `tell` itself writes here, such as a handler's own failure, is dropped.
        if newline and whole.strip() and not getattr(self._own, "telling", False):
            self._own.telling = True
            try:
                self._tell(whole)
            finally:
                self._own.telling = False
        return len(text)


def _on_uncaught(
    kind: type[BaseException], problem: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        logger.error("interrupted")
    else:
        logger.critical("uncaught %s", kind.__name__, exc_info=(kind, problem, trace))


def _on_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "a thread"
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        told = (args.exc_type, args.exc_value, args.exc_traceback)
        logger.critical("uncaught %s in %s", args.exc_type.__name__, name, exc_info=told)


def _on_unraisable(args: sys.UnraisableHookArgs) -> None:
    what = args.err_msg or "exception ignored in"
    told = None
    if args.exc_value is not None:
        told = (args.exc_type, args.exc_value, args.exc_traceback)
    logger.error("%s %r", what, args.object, exc_info=told)
