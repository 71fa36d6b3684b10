"""The driver is asked for the GPU's kind, and a machine without one answers None."""

from __future__ import annotations

import types
from typing import Any

import pytest

from inferq.workers.cuda import libcuda


def _driver(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    monkeypatch.setattr(libcuda, "_driver", lambda: types.SimpleNamespace(**calls))


def _set(pointer: Any, value: int) -> int:
    pointer._obj.value = value
    return 0


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "_driver", lambda: None)
    assert libcuda.compute_capability() is None
    assert libcuda.current_context() is None
    libcuda.pop_context()


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "LIBRARY", "libcuda.so.that.is.nowhere")
    libcuda._driver.cache_clear()
    try:
        assert libcuda.compute_capability() is None
    finally:
        libcuda._driver.cache_clear()


def test_the_capability_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {75: 8, 76: 9}
    _driver(
        monkeypatch,
        cuInit=lambda flags: 0,
        cuDeviceGet=_set,
        cuDeviceGetAttribute=lambda number, which, handle: _set(number, numbers[which]),
    )
    assert libcuda.compute_capability() == "8.9"


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    names = ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"]
    _driver(monkeypatch, **{name: lambda *_, code=100 * (name == fails): code for name in names})
    assert libcuda.compute_capability() is None


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
