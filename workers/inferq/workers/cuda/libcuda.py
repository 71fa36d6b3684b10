"""Asks the CUDA driver a few things, without any package of CUDA's."""

from __future__ import annotations

import ctypes
import functools
from typing import Final

LIBRARY: Final = "libcuda.so.1"
#: Of enum CUdevice_attribute.
_MAJOR, _MINOR = 75, 76


def compute_capability(device: int = 0) -> str | None:
    """The compute capability of GPU `device`, as "9.0"; None if no GPU can be used.

    Starts the driver in this process: CUDA_VISIBLE_DEVICES counts from here on. No context is made.
    """
    driver = _driver()
    handle = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle):
            return None
        numbers.append(str(number.value))
    return ".".join(numbers)


def total_memory(device: int = 0) -> int | None:
    """Bytes of GPU `device`, or of the slice of one that is visible; None if none can be used.

    Starts the driver as `compute_capability` does.
    """
    driver, handle, nbytes = _driver(), ctypes.c_int(), ctypes.c_size_t()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
        return None
    if driver.cuDeviceTotalMem_v2(ctypes.byref(nbytes), handle):
        return None
    return nbytes.value


def current_context() -> int | None:
    """The address of the CUDA context that is current in this thread; None if there is none."""
    driver, context = _driver(), ctypes.c_void_p()
    if driver is None or driver.cuCtxGetCurrent(ctypes.byref(context)):
        return None
    return context.value


def pop_context() -> None:
    """Make the CUDA context current that was so before the current one."""
    driver = _driver()
    if driver is not None:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None
