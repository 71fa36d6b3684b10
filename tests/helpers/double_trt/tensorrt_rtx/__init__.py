"""A double of the module ``tensorrt_rtx``: that of ``tensorrt`` (beside it), and what RTX has more.

Its contexts compile the kernels of each shape when they first run it, unless the runtime cache has
them. What a runtime cache holds is the list of those shapes. Where it captures graphs by itself, a
context captures each shape in its first run, on the stream of that run; in which mode the real one
does, NVIDIA does not say: here in the one that other threads spoil least.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import tensorrt
from tensorrt import (
    DataType,
    ExecutionContextAllocationStrategy,
    ILogger,
    IProgressMonitor,
    MemoryPoolType,
    OnnxParser,
    TensorIOMode,
)

__all__ = [
    "Builder", "ComputeCapability", "CudaGraphStrategy", "DataType",
    "DynamicShapesKernelSpecializationStrategy", "EngineValidity",
    "ExecutionContextAllocationStrategy", "ILogger", "IProgressMonitor", "MemoryPoolType",
    "OnnxParser", "Runtime", "TensorIOMode",
]  # fmt: skip
__version__ = "1.7.double"

_THREAD_LOCAL = 1
#: What a test has done while a context captures.
during_captures: list[Callable[[], object]] = []


class ComputeCapability(Enum):
    CURRENT = 0


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class EngineValidity(Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class _Blob(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class _RuntimeCache:
    def __init__(self) -> None:
        self.shapes: set[str] = set()

    def deserialize(self, content: bytes) -> bool:
        self.shapes = set(json.loads(content))
        return True

    def serialize(self) -> _Blob:
        return _Blob(json.dumps(sorted(self.shapes)).encode())


class _RuntimeConfig(tensorrt.RuntimeConfig):  # type: ignore[misc]
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self) -> None:
        self.cache = _RuntimeCache()

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache()

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self.cache = cache
        return True


class _Config(tensorrt._Config):  # type: ignore[misc]
    num_compute_capabilities = 0

    def set_compute_capability(self, _capability: ComputeCapability, _index: int) -> bool:
        return True


class Builder(tensorrt.Builder):  # type: ignore[misc]
    def create_builder_config(self) -> _Config:
        return _Config()


class Runtime(tensorrt.Runtime):  # type: ignore[misc]
    def get_engine_validity(self, _plan: bytes) -> tuple[EngineValidity, int]:
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        engine = super().deserialize_cuda_engine(plan)
        if engine is not None:
            engine.__class__ = _Engine
        return engine


class _Engine(tensorrt._Engine):  # type: ignore[misc]
    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(self, config: Any) -> Any:
        return _Context(self, config)


class _Context(tensorrt._Context):  # type: ignore[misc]
    def __init__(self, engine: _Engine, config: _RuntimeConfig) -> None:
        super().__init__(engine, config)
        self._cache = config.cache
        self._captures = config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._graphs: dict[tuple[str, str], ctypes.c_void_p] = {}

    def execute_async_v3(self, stream: int) -> bool:
        shapes: dict[str, Sequence[int]] = dict(self._shapes)
        self._cache.shapes.add(json.dumps(shapes))
        if not self._captures:
            return bool(super().execute_async_v3(stream))
        key = (json.dumps(shapes), json.dumps(self._addresses))
        if key not in self._graphs and not self._capture(stream, key):
            return False
        return not _driver.cuGraphLaunch(self._graphs[key], ctypes.c_void_p(stream))

    def _capture(self, stream: int, key: tuple[str, str]) -> bool:
        handle, graph, made = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
        _driver.cuStreamBeginCapture_v2(handle, _THREAD_LOCAL)
        super().execute_async_v3(stream)
        for act in during_captures:
            act()
        code = _driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        if code:
            self._log(f"CUDA error {code} in a capture")
            return False
        _driver.cuGraphInstantiateWithFlags(ctypes.byref(made), graph, ctypes.c_ulonglong(0))
        _driver.cuGraphDestroy(graph)
        self._graphs[key] = made
        return True

    def __del__(self) -> None:
        for made in self._graphs.values():
            _driver.cuGraphExecDestroy(made)


_driver = ctypes.CDLL("libcuda.so.1")
