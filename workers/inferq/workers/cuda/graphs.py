"""CUDA graphs: what a stream was given once is launched again as one thing.

PyCUDA has no graphs; cuda-bindings takes its streams by their handles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

logger = logging.getLogger(__name__)

try:
    from cuda.bindings import driver as _cuda
except Exception as missing:  # noqa: BLE001 - also what a driver too old for it makes it raise
    _cuda = None
    _why_not: object = missing
else:
    _why_not = None

#: What waits in the log after the first time.
_SUCCESS: Final = 0


class CaptureFailed(Exception):
    """It cannot be captured; it has to be enqueued each time."""


class Graph:
    """What `enqueue` puts on the stream, captured. The context is current whenever it is used.

    Nothing runs while it is captured. CaptureFailed: the reason.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        if _cuda is None:
            raise CaptureFailed(f"cuda-bindings cannot be used: {_why_not}")
        self._stream = stream
        # Only this thread's calls are part of it, and only they can spoil it.
        mode = _cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(_cuda.cuStreamBeginCapture, stream, mode)
        try:
            enqueue()
        except Exception as problem:
            _cuda.cuStreamEndCapture(stream)
            raise CaptureFailed(str(problem)) from problem
        graph = _call(_cuda.cuStreamEndCapture, stream)
        try:
            self._executable = _call(_cuda.cuGraphInstantiate, graph, 0)
        finally:
            _cuda.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Put it on the stream. RuntimeError: CUDA refused."""
        (status,) = _cuda.cuGraphLaunch(self._executable, self._stream)
        if int(status) != _SUCCESS:
            raise RuntimeError(f"cuGraphLaunch: {status.name}")

    def close(self) -> None:
        """Free it. Nothing of it is running by then."""
        _cuda.cuGraphExecDestroy(self._executable)


def _call(function: Callable[..., tuple[Any, ...]], *args: object) -> Any:
    try:
        status, *results = function(*args)
    except Exception as problem:  # as where the driver has no such function
        raise CaptureFailed(f"{function.__name__}: {problem}") from problem
    if int(status) != _SUCCESS:
        raise CaptureFailed(f"{function.__name__}: {status.name}")
    return results[0] if results else None
