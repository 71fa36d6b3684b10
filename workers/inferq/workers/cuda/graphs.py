"""CUDA graphs: what a stream was given once is launched again as one thing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from inferq.workers.cuda import calls
from inferq.workers.cuda.calls import DriverError
from inferq.workers.models.engine import OutOfDeviceMemory

logger = logging.getLogger(__name__)


class CaptureFailed(Exception):
    """It cannot be captured; it has to be enqueued each time."""


class Graphs:
    """Whether a model's lanes capture graphs. Shared by them: what fails on one fails on all.

    `within_runs`: the executor captures by itself, in the first runs of a set of shapes.
    """

    def __init__(self, on: bool, *, within_runs: bool = False) -> None:
        self.on = on
        self.within_runs = within_runs

    def turn_off(self, problem: CaptureFailed) -> None:
        """A capture has failed."""
        if self.on:
            self.on = False
            logger.warning("runs without CUDA graphs from now on: %s", problem)


class Graph:
    """What `work` puts on the stream, captured. The context is current whenever it is used.

    CaptureFailed: the reason.
    """

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        self._stream = stream
        try:
            graph = _captured(stream, work)
            try:
                self._executable = calls.instantiate(graph)
            finally:
                calls.destroy_graph(graph)
            with suppress(DriverError):  # the first launch does it then
                calls.upload(self._executable, stream)
        except DriverError as problem:
            raise CaptureFailed(str(problem)) from problem

    def launch(self) -> None:
        """Put it on the stream. OutOfDeviceMemory, DriverError."""
        try:
            calls.launch(self._executable, self._stream)
        except DriverError as problem:
            if problem.code == calls.OUT_OF_MEMORY:
                raise OutOfDeviceMemory(str(problem)) from problem
            raise

    def close(self) -> None:
        """Free it. Nothing of it is running by then. DriverError."""
        calls.destroy_executable(self._executable)


def _captured(stream: int, work: Callable[[], None]) -> int:
    calls.begin_capture(stream)
    try:
        work()
    except Exception as problem:
        with suppress(DriverError):
            calls.destroy_graph(calls.end_capture(stream))
        raise CaptureFailed(str(problem)) from problem
    return calls.end_capture(stream)
