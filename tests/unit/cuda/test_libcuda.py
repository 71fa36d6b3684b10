"""The driver is asked for the GPU's kind, and a machine without one answers None."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from helpers.fakecuda import run_python

from inferq.workers.cuda import libcuda


def _driver(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    monkeypatch.setattr(libcuda, "_driver", lambda: types.SimpleNamespace(**calls))


def _set(pointer: Any, value: int) -> int:
    pointer._obj.value = value
    return 0


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "_driver", lambda: None)
    assert libcuda.gpu_kind() is None
    assert libcuda.current_context() is None
    assert libcuda.context_failure() is None
    libcuda.pop_context()


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "LIBRARY", "libcuda.so.that.is.nowhere")
    libcuda._driver.cache_clear()
    try:
        assert libcuda.gpu_kind() is None
    finally:
        libcuda._driver.cache_clear()


def test_the_kind_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {75: 8, 76: 9, 16: 142}

    def named(into: Any, size: int, handle: Any) -> int:
        into.value = b"NVIDIA L40"[: size - 1]
        return 0

    _driver(
        monkeypatch,
        cuInit=lambda flags: 0,
        cuDeviceGet=_set,
        cuDeviceGetName=named,
        cuDeviceGetAttribute=lambda number, which, handle: _set(number, numbers[which]),
    )
    kind = libcuda.gpu_kind()
    assert kind == libcuda.GpuKind("NVIDIA L40", "8.9", 142)
    assert str(kind) == "NVIDIA L40, 142 SMs"


@pytest.mark.parametrize(
    "fails", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"]
)
def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    names = ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"]
    _driver(monkeypatch, **{name: lambda *_, code=100 * (name == fails): code for name in names})
    assert libcuda.gpu_kind() is None


def test_the_memory_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(
        monkeypatch,
        cuInit=lambda flags: 0,
        cuDeviceGet=_set,
        cuDeviceTotalMem_v2=lambda nbytes, handle: _set(nbytes, 80 << 30),
    )
    assert libcuda.total_memory() == 80 << 30


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDeviceTotalMem_v2"])
def test_a_driver_that_fails_has_no_memory(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    names = ["cuInit", "cuDeviceGet", "cuDeviceTotalMem_v2"]
    _driver(monkeypatch, **{name: lambda *_, code=100 * (name == fails): code for name in names})
    assert libcuda.total_memory() is None
    monkeypatch.setattr(libcuda, "_driver", lambda: None)
    assert libcuda.total_memory() is None


def test_contexts_are_asked_for_and_popped(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = [0x1000, 0x2000]
    _driver(
        monkeypatch,
        cuCtxGetCurrent=lambda pointer: _set(pointer, stack[-1]),
        cuCtxPopCurrent_v2=lambda pointer: _set(pointer, stack.pop()),
    )
    assert libcuda.current_context() == 0x2000
    libcuda.pop_context()
    assert libcuda.current_context() == 0x1000


#: Prints what CUDA answers before it is used, used, and once it answers `CODE` to every call.
_FAILURE = """
import ctypes
from helpers.fakecuda.control import Control
from inferq.workers.cuda.libcuda import context_failure
control, context = Control(), ctypes.c_void_p()
print(context_failure())
cuda = ctypes.CDLL("libcuda.so.1")
cuda.cuInit(0)
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
print(context_failure())
control.fail({code})
print(context_failure())
"""


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (700, "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"),
        (2, "None"),
        (901, "None"),
    ],
)
def test_what_stays_is_told_from_what_passes(fake_driver: Path, code: int, failure: str) -> None:
    said = run_python(_FAILURE.format(code=code), fake_driver).splitlines()
    assert said == ["None", "None", failure]


def test_a_driver_without_a_device_has_no_failure(fake_driver: Path) -> None:
    said = run_python(_FAILURE.format(code=100), fake_driver, devices=0).splitlines()
    assert said == ["None"] * 3


#: Asks in one thread what CUDA answers while another captures a graph, and prints how that ended.
_CAPTURE = """
import ctypes, threading
from helpers.fakecuda.control import Control
from inferq.workers.cuda.libcuda import context_failure
control, context = Control(), ctypes.c_void_p()
stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
cuda = ctypes.CDLL("libcuda.so.1")
assert not cuda.cuInit(0)
assert not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
assert not cuda.cuCtxPushCurrent_v2(context)
assert not cuda.cuStreamCreate(ctypes.byref(stream), 1)
assert not cuda.cuStreamBeginCapture_v2(stream, 0)  # of mode global
control.launch(stream)
asking = threading.Thread(target=lambda: print(context_failure()))
asking.start()
asking.join()
print(cuda.cuStreamEndCapture(stream, ctypes.byref(graph)))
"""


def test_asking_breaks_no_capture_of_another_thread(fake_driver: Path) -> None:
    assert run_python(_CAPTURE, fake_driver).splitlines() == ["None", "0"]
