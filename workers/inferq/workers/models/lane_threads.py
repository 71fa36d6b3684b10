"""The threads that drive a model's lanes, from their first run on.

Libraries keep things by thread: cuDNN's plans, for one. So a lane warms up in the thread that will
run it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from inferq.workers.models.engine import Lane

T = TypeVar("T")


class LaneThread:
    """Does what it is called for, one thing after the other, until it is told to end."""

    def __init__(self, name: str) -> None:
        self._works: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done; what it returns or raises is in the future."""
        future: Future[T] = Future()
        self._works.put((future, work))
        return future

    def end(self) -> None:
        """After all that it was called for."""
        self._works.put(None)

    def join(self, timeout: float) -> None:
        """Wait until it has ended, so many seconds at most."""
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (asked := self._works.get()) is not None:
            future, work = asked
            try:
                future.set_result(work())
            except BaseException as problem:  # noqa: BLE001 - raised to who waits
                future.set_exception(problem)
            del asked, future, work  # a batch's arrays, maybe


class LaneThreads:
    """One thread for each lane that is asked for. `name`: of the threads, with a number."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: dict[int, tuple[Lane, LaneThread]] = {}

    def of(self, lane: Lane) -> LaneThread:
        """The thread of `lane`, which runs."""
        found = self._threads.get(id(lane))
        if found is None:
            thread = LaneThread(f"{self._name}-{len(self._threads)}")
            found = self._threads[id(lane)] = lane, thread
            thread.start()
        return found[1]

    def each(self, lanes: Sequence[Lane], work: Callable[[int], object]) -> None:
        """Call `work` with 0 to the last one's number, each in the thread of that lane, all at
        once. Raises what the first one raised.
        """
        # What each takes is there at the same time only if none has ended before the last begins.
        together = threading.Barrier(len(lanes))

        def run(number: int) -> None:
            together.wait()
            work(number)

        calls = [
            self.of(lane).call(lambda number=number: run(number))  # type: ignore[misc]
            for number, lane in enumerate(lanes)
        ]
        problems = [call.exception() for call in calls]
        for problem in problems:
            if problem is not None:
                raise problem

    def end(self) -> None:
        """End them all, after what they were called for."""
        for _, thread in self._threads.values():
            thread.end()
