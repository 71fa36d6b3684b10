"""The fake driver's own functions, called from the process that has loaded it."""

from __future__ import annotations

import ctypes
import functools
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from inferq.shared.schema import Array

Kernel = Callable[[], int | None]
LAUNCH_FAILED: Final = 719


class Control:
    """What a test sets, starts and counts."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fakecuda_count.restype = ctypes.c_longlong
        self._library.fakecuda_launch_us.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_double,
        ]
        self._library.fakecuda_set.argtypes = [ctypes.c_char_p, ctypes.c_double]
        #: Kept for good, since streams and graphs may still have to run them.
        self._kernels: dict[Kernel, Any] = {}

    def launch(self, stream: int, kernel: Kernel | None = None, us: float = -1.0) -> int:
        """Run `kernel` on the device as a kernel of the stream with the handle `stream`.

        It takes `us` microseconds at least; below 0: what FAKECUDA_KERNEL_US says. What it returns
        other than 0 or None is the device's error from then on; so is CUDA_ERROR_LAUNCH_FAILED if
        it raises. Who launches often passes the same function again: each is kept. Returns the
        driver's answer.
        """
        pointer = None
        if kernel is not None:
            called = self._kernels.setdefault(kernel, _TYPE(functools.partial(_call, kernel)))
            pointer = ctypes.cast(called, ctypes.c_void_p)
        return int(self._library.fakecuda_launch_us(stream, pointer, None, us))

    def fail(self, code: int) -> None:
        """Every later call answers `code`; 0: none does any more."""
        self._library.fakecuda_fail(code)

    def count(self, name: str) -> int:
        """One of the counts of libcuda.c."""
        found = int(self._library.fakecuda_count(name.encode()))
        if found < 0:
            raise KeyError(name)
        return found

    def set(self, name: str, value: float) -> None:
        """Set ``ns_per_byte``, ``kernel_us`` or ``memory_mb`` of all that is queued from now on.

        ``hosts``: as long as it is not 0, times are simulated. The timeline, which ``timeline_us``
        counts, goes on whenever so many threads wait for events. ``graph_bytes``: for a graph that
        copies more the card has no memory (0: for any it has). ``switch_fails``: to push and pop a
        context is answered by a sticky error, too.
        """
        if self._library.fakecuda_set(name.encode(), value):
            raise KeyError(name)


def on_device(address: int, shape: Sequence[int], dtype: str) -> Array:
    """The tensor at an address of the fake device's memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = memoryview((ctypes.c_char * size).from_address(address))
    return np.frombuffer(memory, np.dtype(dtype)).reshape(shape)


def _call(kernel: Kernel, _: object) -> int:
    try:
        return kernel() or 0
    except Exception:  # noqa: BLE001 - the driver's thread has nobody to raise to
        traceback.print_exc()
        return LAUNCH_FAILED


_TYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
