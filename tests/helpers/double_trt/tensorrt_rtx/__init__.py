"""A double of the module ``tensorrt_rtx``: that of ``tensorrt`` (beside it), and what RTX has more.

Its contexts compile the kernels of each shape when they first run it, unless the runtime cache has
them. What a runtime cache holds is the list of those shapes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

    def execute_async_v3(self, stream: int) -> bool:
        shapes: dict[str, Sequence[int]] = dict(self._shapes)
        self._cache.shapes.add(json.dumps(shapes))
        return bool(super().execute_async_v3(stream))
