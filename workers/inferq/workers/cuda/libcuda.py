"""Asks the CUDA driver a few things, without any package of CUDA's."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Final

LIBRARY: Final = "libcuda.so.1"
#: Of enum CUdevice_attribute.
_PROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_MAX_NAME_BYTES: Final = 256
#: Of CUresult: what passes. Memory is short, work has not ended, or the capture of a graph was
#: broken (900 to 908); and that there is no device. All else is answered to every call until the
#: process ends.
_PASSING: Final = frozenset({2, 600, *range(900, 909), 100, 101})
_NON_BLOCKING: Final = 1
#: Of enum CUstreamCaptureMode: this thread's calls are not held against other threads' captures.
_RELAXED: Final = 2


@dataclass(frozen=True)
class GpuKind:
    """What code that was measured on one GPU can be expected to suit as well on another.

    An H100, an H200 and each MIG device of either have one compute capability: they differ in their
    names and in how many streaming multiprocessors they have.
    """

    name: str
    #: The compute capability, as "9.0".
    capability: str
    #: Streaming multiprocessors.
    processors: int

    def __str__(self) -> str:
        return f"{self.name}, {self.processors} SMs"


def gpu_kind(device: int = 0) -> GpuKind | None:
    """Which kind GPU `device` is of; None if no GPU can be used.

    Starts the driver in this process: CUDA_VISIBLE_DEVICES counts from here on. No context is made.
    """
    driver = _driver()
    handle = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
        return None
    name = ctypes.create_string_buffer(_MAX_NAME_BYTES)
    if driver.cuDeviceGetName(name, _MAX_NAME_BYTES, handle):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR, _PROCESSORS):
        number = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle):
            return None
        numbers.append(number.value)
    major, minor, processors = numbers
    return GpuKind(name.value.decode(errors="replace"), f"{major}.{minor}", processors)


def total_memory(device: int = 0) -> int | None:
    """Bytes of GPU `device`, or of the slice of one that is visible; None if none can be used.

    Starts the driver as `gpu_kind` does.
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


def context_failure(device: int = 0) -> str | None:
    """Why CUDA is beyond use in this process until it ends; None: it is well, or nobody uses it.

    Asks the primary context of GPU `device`, which all libraries of a process share. It waits for
    no work but that of a new stream, which has none: a hung kernel does not keep it, and another
    thread's capture of a graph goes on.
    """
    driver, handle = _driver(), ctypes.c_int()
    flags, is_active = ctypes.c_uint(), ctypes.c_int()
    if driver is None or driver.cuInit(0):
        return None
    code = (
        driver.cuDeviceGet(ctypes.byref(handle), device)
        or driver.cuDevicePrimaryCtxGetState(handle, ctypes.byref(flags), ctypes.byref(is_active))
        or (_answer_of(driver, handle) if is_active.value else 0)
    )
    return None if code == 0 or code in _PASSING else _said(driver, code)


def _answer_of(driver: ctypes.CDLL, device: ctypes.c_int) -> int:
    """What the device's primary context answers to a call that does nothing; 0: all is well."""
    context, stream, mode = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(_RELAXED)
    code: int = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if code:
        return code
    code = driver.cuCtxPushCurrent_v2(context)
    if not code:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        code = driver.cuStreamCreate(
            ctypes.byref(stream), _NON_BLOCKING
        ) or driver.cuStreamSynchronize(stream)
        if stream:
            driver.cuStreamDestroy_v2(stream)
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        pop_context()
    driver.cuDevicePrimaryCtxRelease_v2(device)
    return code


def _said(driver: ctypes.CDLL, code: int) -> str:
    texts = []
    for function in (driver.cuGetErrorName, driver.cuGetErrorString):
        text = ctypes.c_char_p()
        if not function(code, ctypes.byref(text)) and text.value:
            texts.append(text.value.decode(errors="replace"))
    return ": ".join(texts) or f"error {code}"


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None
