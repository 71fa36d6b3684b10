"""TensorRT's log: goes to Python's, and its errors besides into ours.

Errors and warnings are logged as such, its chatter at level DEBUG and below.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

logger = logging.getLogger(__name__)

#: Errors of TensorRT's that a message repeats, and characters of all of them.
_MAX_ERRORS: Final = 5
_MAX_REASON_CHARS: Final = 1000
#: Below DEBUG: a line for every tactic that is tried.
_VERBOSE_LEVEL: Final = 5
#: As TensorRT's allocator, its own error codes, CUDA's runtime and its driver put it.
_OUT_OF_MEMORY: Final = re.compile(
    r"out[ _]?of[ _]?memory|cudaErrorMemoryAllocation|FAILED_ALLOCATION", re.IGNORECASE
)


class CallErrors:
    """The errors that TensorRT logs of a call: it has one log for all that a process does.

    What a call finds wrong is logged by the thread that made the call. What is loaded or built goes
    on in threads of TensorRT's own besides, which never call us: their errors belong to whatever is
    being loaded or built meanwhile.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._lock = threading.Lock()
        self._loading: list[deque[str]] = []

    def begin(self) -> Sequence[str]:
        """This thread makes a call now. Returns where its errors will be, until the next call's."""
        return self._begin()

    @contextmanager
    def loading(self) -> Iterator[Sequence[str]]:
        """The same, for a call that may have other threads work for it."""
        errors = self._begin()
        with self._lock:
            self._loading.append(errors)
        try:
            yield errors
        finally:
            with self._lock:
                self._loading = [each for each in self._loading if each is not errors]

    def add(self, error: str) -> None:
        """TensorRT logs `error` in this thread."""
        own: deque[str] | None = getattr(self._own, "errors", None)
        if own is not None:
            own.append(error)
            return
        with self._lock:
            for errors in self._loading:
                errors.append(error)

    def _begin(self) -> deque[str]:
        errors: deque[str] | None = getattr(self._own, "errors", None)
        if errors is None:
            errors = self._own.errors = deque(maxlen=_MAX_ERRORS)
        errors.clear()
        return errors


def make_logger(trt: Any) -> tuple[Any, CallErrors]:
    """A logger for TensorRT, of which it wants one per process, and the errors of calls."""
    errors = CallErrors()
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: _VERBOSE_LEVEL,
    }

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.ERROR)
            if level >= logging.ERROR:
                errors.add(" ".join(message.split()))
            logger.log(level, "%s", message)

    return Log(), errors


def is_out_of_memory(errors: Sequence[str]) -> bool:
    """Whether a call failed, by the errors logged of it, since the GPU's memory was full."""
    return any(_OUT_OF_MEMORY.search(error) for error in errors)


def joined(errors: Sequence[str]) -> str:
    """What was logged, in one line."""
    text = "; ".join(errors) or "it logged no reason"
    return text if len(text) <= _MAX_REASON_CHARS else text[:_MAX_REASON_CHARS] + "…"
