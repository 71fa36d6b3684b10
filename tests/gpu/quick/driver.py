"""NVIDIA's driver by ctypes: each function answers its number, 0 for success.

PyCUDA turns answers into exceptions, and some of them are never seen; here they are what is asked
for. Nothing but the driver is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any, Final

LIBRARY: Final = "libcuda.so.1"
_FAKE_PATIENCE: Final = 3
NON_BLOCKING: Final = 1
BLOCKING_SYNC: Final = 1
#: Of enum CUdevice_attribute.
MULTIPROCESSORS: Final = 16
#: Of enum CUstreamCaptureMode.
MODES: Final = {"global": 0, "thread_local": 1, "relaxed": 2}

_P: Final = c_void_p  # a pointer or a handle
_ARGUMENTS: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_P,),
    "cuGetErrorName": (c_int, _P),
    "cuDeviceGet": (_P, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_P, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_P, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuDevicePrimaryCtxReset_v2": (c_int,),
    "cuCtxSetCurrent": (_P,),
    "cuCtxGetCurrent": (_P,),
    "cuCtxPushCurrent_v2": (_P,),
    "cuCtxPopCurrent_v2": (_P,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (_P, _P),
    "cuMemAlloc_v2": (_P, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (_P, c_size_t),
    "cuMemFreeHost": (_P,),
    "cuMemcpyHtoD_v2": (c_uint64, _P, c_size_t),
    "cuMemcpyHtoDAsync_v2": (c_uint64, _P, c_size_t, _P),
    "cuMemcpyDtoHAsync_v2": (_P, c_uint64, c_size_t, _P),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, _P),
    "cuStreamCreate": (_P, c_uint),
    "cuStreamDestroy_v2": (_P,),
    "cuStreamSynchronize": (_P,),
    "cuStreamQuery": (_P,),
    "cuStreamBeginCapture_v2": (_P, c_int),
    "cuStreamEndCapture": (_P, _P),
    "cuEventCreate": (_P, c_uint),
    "cuEventDestroy_v2": (_P,),
    "cuEventRecord": (_P, _P),
    "cuEventQuery": (_P,),
    "cuEventSynchronize": (_P,),
    "cuEventElapsedTime_v2": (_P, _P, _P),
    "cuEventElapsedTime": (_P, _P, _P),
    "cuGraphInstantiateWithFlags": (_P, _P, c_uint64),
    "cuGraphLaunch": (_P, _P),
    "cuGraphUpload": (_P, _P),
    "cuGraphDestroy": (_P,),
    "cuGraphExecDestroy": (_P,),
    "cuModuleLoadData": (_P, _P),
    "cuModuleUnload": (_P,),
    "cuModuleGetFunction": (_P, _P, c_char_p),
    "cuLaunchKernel": (_P, *[c_uint] * 7, _P, _P, _P),
}


class CudaError(Exception):
    """What the driver answered where that was not expected."""


class Driver:
    """`call` answers what the driver does; the other methods raise CudaError unless that is 0."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        #: Whether it is the fake one of helpers.fakecuda.
        self.fake: Final = is_fake(self._library)
        self._functions: dict[str, Callable[..., int]] = {}
        self.check("cuInit", 0)

    def call(self, name: str, *given: object) -> int:
        """The function `name` of the driver."""
        function = self._functions.get(name)
        if function is None:
            found = getattr(self._library, name)
            found.argtypes = _ARGUMENTS[name]
            function = self._functions[name] = found
        return int(function(*given))

    def check(self, name: str, *given: object) -> None:
        """The same, if it has to succeed."""
        if answer := self.call(name, *given):
            raise CudaError(f"{name}: {self.name_of(answer)}")

    def made(self, name: str, *given: object) -> int:
        """The number or handle that it writes to its first parameter."""
        into = c_void_p()
        self.check(name, byref(into), *given)
        return into.value or 0

    def number(self, name: str, *given: object) -> int:
        """The int that it writes to its first parameter."""
        into = c_int()
        self.check(name, byref(into), *given)
        return into.value

    def name_of(self, answer: int) -> str:
        """As 700 → "700 CUDA_ERROR_ILLEGAL_ADDRESS"."""
        into = c_char_p()
        if self.call("cuGetErrorName", answer, byref(into)) or into.value is None:
            return str(answer)
        return f"{answer} {into.value.decode()}"

    def open(self) -> int:
        """The primary context of device 0, current in this thread."""
        context = self.made("cuDevicePrimaryCtxRetain", 0)
        self.check("cuCtxSetCurrent", context)
        return context

    def attribute(self, number: int) -> int:
        """Of device 0."""
        return self.number("cuDeviceGetAttribute", number, 0)

    def device_name(self) -> str:
        """Of device 0."""
        into = ctypes.create_string_buffer(128)
        self.check("cuDeviceGetName", into, len(into), 0)
        return into.value.decode()

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        free, total = c_size_t(), c_size_t()
        self.check("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def stream(self) -> int:
        """A new one that does not wait for the legacy stream."""
        return self.made("cuStreamCreate", NON_BLOCKING)

    def event(self, flags: int = 0) -> int:
        """A new one."""
        return self.made("cuEventCreate", flags)

    def ms_between(self, began: int, ended: int) -> float:
        """By the card's clock; both have happened."""
        into = c_float()
        newer = hasattr(self._library, "cuEventElapsedTime_v2")
        name = "cuEventElapsedTime_v2" if newer else "cuEventElapsedTime"
        self.check(name, byref(into), began, ended)
        return into.value


def is_fake(library: ctypes.CDLL | None = None) -> bool:
    """Whether the driver that this process finds is the fake one. OSError: there is none."""
    return hasattr(library or ctypes.CDLL(LIBRARY), "fakecuda_count")


def patient(seconds: int, fake: bool) -> int:
    """A limit in seconds; longer in a dry run, whose machine may have other things to do."""
    return seconds * _FAKE_PATIENCE if fake else seconds
