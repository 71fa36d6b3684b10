"""Functions that other threads have the data plane's thread run, between two batches."""

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
        #: Held while one is put or the end comes: none is put behind the end.
        self._lock = threading.Lock()
        self._ended = False

    def put(self, function: Callable[[], T]) -> Future[T]:
        """Have `function` run; what it returns or raises is the future's."""
        future: Future[T] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(DataPlaneEnded())
                return future
            self._waiting.append((function, future))
        self._wake()
        return future

    def run(self) -> None:
        """Run those that wait; not those that are put meanwhile. Raises nothing."""
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
        """Fail those that wait, and all that come."""
        with self._lock:
            self._ended = True
        while self._waiting:
            _, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(DataPlaneEnded())
