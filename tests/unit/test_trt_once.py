"""A plan is run on a GPU for verification; here on doubles that keep device memory in NumPy."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inferq.shared.errors import ConfigError, EngineError
from inferq.shared.schema import Array
from inferq.workers.trt.flavours import IOTensor
from inferq.workers.trt.once import loaded


class _Memory:
    """Host memory that stands for the device's; its address is a number."""

    live: dict[int, bytearray] = {}  # noqa: RUF012 - one machine

    def __init__(self, size: int) -> None:
        self._address = 4096 * (1 + len(self.live))
        self.live[self._address] = bytearray(size)

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        del self.live[self._address]


class _Primary:
    log: list[str] = []  # noqa: RUF012 - one machine

    def push(self) -> None:
        self.log.append("push")

    def pop(self) -> None:
        self.log.append("pop")

    def detach(self) -> None:
        self.log.append("detach")


class _CudaError(Exception):
    pass


class _Stream:
    handle = 7

    def __init__(self, flags: int) -> None:
        assert flags == 1

    def synchronize(self) -> None: ...


class _Context:
    """y = x + x."""

    def __init__(self, log: list[str]) -> None:
        self._shape: tuple[int, ...] = (-1, 3)
        self._addresses: dict[str, int] = {}
        self._log = log

    def close(self) -> None:
        self._log.append("context closed")

    def set_profile(self, index: int, stream: int) -> None:
        assert (index, stream) == (0, 7)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def infer_shapes(self) -> None: ...

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def set_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute(self, stream: int) -> None:
        assert stream == 7
        x = np.frombuffer(_Memory.live[self._addresses["x"]], np.float32)
        _Memory.live[self._addresses["y"]][:] = (x + x).tobytes()


class _Engine:
    profiles = 1
    tensors = (
        IOTensor("x", True, np.dtype(np.float32), (-1, 3)),
        IOTensor("y", False, np.dtype(np.float32), (-1, 3)),
    )

    def context(self) -> _Context:
        return _Context(_Primary.log)

    def close(self) -> None:
        _Primary.log.append("plan closed")


class _Flavour:
    def deserialize(self, plan: bytes) -> _Engine:
        if plan != b"plan":
            raise ConfigError("could not load the plan")
        return _Engine()


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    driver: Any = types.ModuleType("pycuda.driver")
    driver.init = lambda: None
    driver.Error = _CudaError
    driver.Device = lambda n: types.SimpleNamespace(retain_primary_context=_Primary)
    driver.Stream = _Stream
    driver.mem_alloc = _Memory

    def upload(memory: _Memory, array: Array) -> None:
        _Memory.live[int(memory)][:] = array.tobytes()

    def download(array: Array, memory: _Memory) -> None:
        array[...] = np.frombuffer(_Memory.live[int(memory)], array.dtype).reshape(array.shape)

    driver.memcpy_htod, driver.memcpy_dtoh = upload, download
    package: Any = types.ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    _Primary.log.clear()
    yield
    assert _Memory.live == {}


def test_inputs_go_in_and_outputs_come_out() -> None:
    with loaded(_Flavour(), b"plan") as run:  # type: ignore[arg-type]
        for rows in (1, 4):
            x = np.arange(3.0 * rows, dtype=np.float32).reshape(rows, 3)
            np.testing.assert_array_equal(run({"x": x})["y"], x + x)
    # The function may live on, but not what it held.
    assert _Primary.log == ["push", "context closed", "plan closed", "pop", "detach"]


def test_a_plan_that_cannot_be_loaded_leaves_no_context_behind() -> None:
    with pytest.raises(ConfigError), loaded(_Flavour(), b"junk"):  # type: ignore[arg-type]
        pass
    assert _Primary.log == ["push", "pop", "detach"]


def test_what_cuda_raises_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, stream: int) -> None:
        raise _CudaError("out of memory")

    monkeypatch.setattr(_Context, "execute", fail)
    flavour: Any = _Flavour()
    with pytest.raises(EngineError, match="CUDA: out of memory"), loaded(flavour, b"plan") as run:
        run({"x": np.ones((1, 3), np.float32)})
    assert _Primary.log[-2:] == ["pop", "detach"]


def test_what_goes_wrong_meanwhile_frees_all() -> None:
    with pytest.raises(KeyError), loaded(_Flavour(), b"plan") as run:  # type: ignore[arg-type]
        run({"z": np.ones((1, 3), np.float32)})
    assert _Primary.log == ["push", "context closed", "plan closed", "pop", "detach"]
