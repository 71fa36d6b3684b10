"""Functions of other threads that the data plane's thread runs between two batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class DataPlaneEnded(RuntimeError):
    """The data plane ended before it ran the function."""

    def __init__(self) -> None:
        super().__init__("the data plane has ended; the function was not run and will not be")


class Calls:
    """`put` may be called from any thread, `run` and `end` from the data plane's alone."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        #: Held while a function is put and in `end`: none is put after the end.
        self._lock = threading.Lock()
        self._ended = False

    def put(self, function: Callable[[], T]) -> Future[T]:
        """Queue `function`. The future gets what it returns or raises."""
        future: Future[T] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(DataPlaneEnded())
                return future
            self._waiting.append((function, future))
        self._wake()
        return future

    def run(self) -> None:
        """Run the queued functions, but not those that are put meanwhile. Raises nothing."""
        for _ in range(len(self._waiting)):
            function, future = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as problem:  # noqa: BLE001 - it is the caller's
                future.set_exception(problem)
            else:
                future.set_result(result)

    def end(self) -> None:
        """Fail the queued functions, and all that are put later."""
        with self._lock:
            self._ended = True
        while self._waiting:
            _, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(DataPlaneEnded())
