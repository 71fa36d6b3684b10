"""The driver's functions that a lane calls for each batch. They keep the GIL; only waiting lets go.

PyCUDA and cuda-bindings give the GIL away in each call: beside a busy Python thread it takes up to
a switch interval (5 ms) to have it back, and that between two commands of one batch. What is called
here takes microseconds and waits for nobody. PyCUDA has no graphs, and its events have no handle.

The context is current whenever one of them is called. Streams, events and graphs are handles.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from inferq.workers.cuda.libcuda import LIBRARY

OUT_OF_MEMORY: Final = 2
#: What has to do with a capture (CUDA_ERROR_STREAM_CAPTURE_…) says nothing of the context's health.
OF_CAPTURES: Final = range(900, 909)

_BLOCKING_SYNC, _DISABLE_TIMING = 1, 2
_RECORD_EXTERNAL: Final = 1
_CAPTURE_THREAD_LOCAL: Final = 1

_HANDLE, _OUT, _SIZE, _FLAGS = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
#: As cuda.h of 13.0 has them.
_SHORT: Final[Mapping[str, Sequence[Any]]] = {
    "cuCtxPushCurrent_v2": (_HANDLE,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuEventCreate": (_OUT, _FLAGS),
    "cuEventDestroy_v2": (_HANDLE,),
    "cuEventRecord": (_HANDLE, _HANDLE),
    "cuEventRecordWithFlags": (_HANDLE, _HANDLE, _FLAGS),
    "cuEventElapsedTime_v2": (_OUT, _HANDLE, _HANDLE),
    "cuMemcpyHtoDAsync_v2": (_HANDLE, _HANDLE, _SIZE, _HANDLE),
    "cuMemcpyDtoHAsync_v2": (_HANDLE, _HANDLE, _SIZE, _HANDLE),
    "cuStreamBeginCapture_v2": (_HANDLE, _FLAGS),
    "cuStreamEndCapture": (_HANDLE, _OUT),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphExecDestroy": (_HANDLE,),
}
_LONG: Final[Mapping[str, Sequence[Any]]] = {
    "cuCtxSynchronize": (),
    "cuStreamSynchronize": (_HANDLE,),
    "cuEventSynchronize": (_HANDLE,),
    "cuGraphInstantiateWithFlags": (_OUT, _HANDLE, ctypes.c_ulonglong),
    "cuGraphUpload": (_HANDLE, _HANDLE),
}


class DriverError(Exception):
    """What the driver answered."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function}: {_name(code)}")
        self.code = code


class _Functions:
    """Each by its name, ready to be called."""

    def __init__(self) -> None:
        for library, signatures in ((ctypes.PyDLL(LIBRARY), _SHORT), (ctypes.CDLL(LIBRARY), _LONG)):
            for name, arguments in signatures.items():
                function = getattr(library, name)
                function.argtypes = arguments
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not among the functions that are called")


_functions = functools.cache(_Functions)
#: What is popped is not looked at, by any thread.
_POPPED: Final = ctypes.byref(ctypes.c_void_p())


def _call(name: str, *arguments: object) -> None:
    code = getattr(_functions(), name)(*arguments)
    if code:
        raise DriverError(name, code)


def _made(name: str, *arguments: object) -> int:
    """The handle that the function puts where its first parameter points to."""
    made = ctypes.c_void_p()
    _call(name, ctypes.byref(made), *arguments)
    return made.value or 0


def _name(code: int) -> str:
    text = ctypes.c_char_p()
    known = ctypes.CDLL(LIBRARY).cuGetErrorName(code, ctypes.byref(text)) == 0
    return (text.value or b"").decode() if known else f"CUDA error {code}"


def push_context(context: int) -> None:
    """Make it current. DriverError: also of what was launched before."""
    code = _functions().cuCtxPushCurrent_v2(context)
    if code:
        raise DriverError("cuCtxPushCurrent_v2", code)


def pop_context() -> None:
    """Make current what was so before. DriverError: also of what was launched before."""
    code = _functions().cuCtxPopCurrent_v2(_POPPED)
    if code:
        raise DriverError("cuCtxPopCurrent_v2", code)


def synchronize_context() -> int:
    """Wait for all that was submitted in the context; the driver's answer, 0: all is well."""
    return int(_functions().cuCtxSynchronize())


def synchronize_stream(stream: int) -> None:
    """Wait for all that was submitted on it."""
    _call("cuStreamSynchronize", stream)


def copy_to_device(address: int, host: int, size: int, stream: int) -> None:
    """Put a copy from pinned memory on the stream."""
    _call("cuMemcpyHtoDAsync_v2", address, host, size, stream)


def copy_to_host(host: int, address: int, size: int, stream: int) -> None:
    """Put a copy to pinned memory on the stream."""
    _call("cuMemcpyDtoHAsync_v2", host, address, size, stream)


class Event:
    """A point of a stream. It is not freed with its last reference, but by `close`."""

    def __init__(self, flags: int) -> None:
        self._handle = _made("cuEventCreate", flags)

    def record(self, stream: int) -> None:
        """Put it on the stream."""
        code = _functions().cuEventRecord(self._handle, stream)
        if code:
            raise DriverError("cuEventRecord", code)

    def record_in_graph(self, stream: int) -> None:
        """Put it on a stream that captures, such that each launch of the graph records it."""
        _call("cuEventRecordWithFlags", self._handle, stream, _RECORD_EXTERNAL)

    def wait(self) -> None:
        """Until what was recorded last by `record` has come."""
        code = _functions().cuEventSynchronize(self._handle)
        if code:
            raise DriverError("cuEventSynchronize", code)

    def ms_since(self, earlier: Event) -> float:
        """Both have come."""
        taken = ctypes.c_float()
        code = _functions().cuEventElapsedTime_v2(
            ctypes.byref(taken), earlier._handle, self._handle
        )
        if code:
            raise DriverError("cuEventElapsedTime_v2", code)
        return taken.value

    def close(self) -> None:
        """Free it."""
        _call("cuEventDestroy_v2", self._handle)


def timing_event() -> Event:
    """One whose time can be asked."""
    return Event(0)


def waiting_event(*, spin: bool) -> Event:
    """One to wait for. `spin`: on the core, for the driver asks the card in a loop."""
    return Event(_DISABLE_TIMING if spin else _DISABLE_TIMING | _BLOCKING_SYNC)


def begin_capture(stream: int) -> None:
    """What is put on the stream from here on becomes a graph. Of other threads only a call that
    waits for the whole context spoils it, and any call of this one that allocates or waits.
    """
    _call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)


def end_capture(stream: int) -> int:
    """The graph. DriverError: something has spoilt it."""
    graph = ctypes.c_void_p()
    _call("cuStreamEndCapture", stream, ctypes.byref(graph))
    return graph.value or 0


def instantiate(graph: int) -> int:
    """What can be launched of it."""
    return _made("cuGraphInstantiateWithFlags", graph, 0)


def upload(executable: int, stream: int) -> None:
    """Take to the card what its first launch would take there."""
    _call("cuGraphUpload", executable, stream)


def launch(executable: int, stream: int) -> None:
    """Put the graph on the stream."""
    code = _functions().cuGraphLaunch(executable, stream)
    if code:
        raise DriverError("cuGraphLaunch", code)


def destroy_graph(graph: int) -> None:
    """What was made of it stays."""
    _call("cuGraphDestroy", graph)


def destroy_executable(executable: int) -> None:
    """Nothing of it is running by then."""
    _call("cuGraphExecDestroy", executable)
