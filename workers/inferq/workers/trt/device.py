"""Asks the CUDA driver which GPU there is, without any package of CUDA's."""

from __future__ import annotations

import ctypes
from typing import Final

_LIBRARY: Final = "libcuda.so.1"
#: Of enum CUdevice_attribute.
_MAJOR, _MINOR = 75, 76


def compute_capability(device: int = 0) -> str | None:
    """The compute capability of GPU `device`, as "9.0"; None if no GPU can be used.

    Starts the driver in this process: CUDA_VISIBLE_DEVICES counts from here on. No context is made.
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle):
            return None
        numbers.append(str(number.value))
    return ".".join(numbers)
