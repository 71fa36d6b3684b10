"""A double of the module ``tensorrt``, for a machine without a GPU: put its folder on PYTHONPATH.

A "plan" is the ONNX file; an execution context runs it by ONNX Runtime on the memory of the fake
driver's device, in stream order. Only what inferq uses of TensorRT is here. With
DOUBLE_TRT_FACTOR its answers of floats are off by that factor; with DOUBLE_TRT_ROWS it has memory
to run that many rows; DOUBLE_TRT_CONTEXT_MB is the device memory that a context needs, and
DOUBLE_TRT_AUX_STREAMS how many streams it wants besides its own.

What goes wrong with contexts goes wrong here, too: see `_Context`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
from helpers.fakecuda.control import Control, on_device
from onnx import TensorProto

__version__ = "11.0.double"

MAGIC = b"double plan "
#: Device memory that a context says it needs.
CONTEXT_BYTES = int(float(os.environ.get("DOUBLE_TRT_CONTEXT_MB", "1")) * 1e6)
AUX_STREAMS = int(os.environ.get("DOUBLE_TRT_AUX_STREAMS", "0"))
FACTOR = float(os.environ.get("DOUBLE_TRT_FACTOR", "1"))
ROWS = int(os.environ.get("DOUBLE_TRT_ROWS", "1000000"))


class DataType(Enum):
    FLOAT, HALF, INT8, INT32, INT64, UINT8, BOOL = range(7)


_DTYPES = {
    TensorProto.FLOAT: DataType.FLOAT, TensorProto.FLOAT16: DataType.HALF,
    TensorProto.INT8: DataType.INT8, TensorProto.INT32: DataType.INT32,
    TensorProto.INT64: DataType.INT64, TensorProto.UINT8: DataType.UINT8,
    TensorProto.BOOL: DataType.BOOL,
}  # fmt: skip
_NUMPY = {
    DataType.FLOAT: "f4", DataType.HALF: "f2", DataType.INT8: "i1", DataType.INT32: "i4",
    DataType.INT64: "i8", DataType.UINT8: "u1", DataType.BOOL: "?",
}  # fmt: skip


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class MemoryPoolType(Enum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class _Tensor:
    is_shape_tensor = False

    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.dtype = _DTYPES[value.type.tensor_type.elem_type]
        dims = value.type.tensor_type.shape.dim
        self.shape: Sequence[int] = tuple(
            dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims
        )


class _Network:
    def __init__(self) -> None:
        self.model = b""
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        network, tensor = self, self.outputs[index]

        class Output:
            name, dtype = tensor.name, tensor.dtype

            @property
            def shape(self) -> Sequence[int]:
                shapes = {each.name: tuple(each.shape) for each in network.inputs}
                if any(dim < 0 for shape in shapes.values() for dim in shape):
                    return tensor.shape
                return _Model(network.model).output_shapes(shapes)[tensor.name]

        return Output()


class _Model:
    """The ONNX file behind a plan."""

    def __init__(self, content: bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(content).graph
        self.inputs = [_Tensor(value) for value in graph.input]
        self.outputs = [_Tensor(value) for value in graph.output]
        self.reads_shapes = any(node.op_type == "Shape" for node in graph.node)
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = [tensor.name for tensor in self.outputs]
        return dict(zip(names, self.session.run(names, inputs), strict=True))

    def output_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(sorted(shapes.items()))
        if key not in self._shapes:
            zeros = {t.name: np.zeros(shapes[t.name], _NUMPY[t.dtype]) for t in self.inputs}
            self._shapes[key] = {name: array.shape for name, array in self.run(zeros).items()}
        return self._shapes[key]


class OnnxParser:
    num_errors = 1

    def __init__(self, network: _Network, _logger: Any) -> None:
        self._network = network
        self._problem = ""

    def parse_from_file(self, path: str) -> bool:
        with open(path, "rb") as file:
            return self.parse(file.read(), path)

    def parse(self, model: bytes, _path: str = "") -> bool:
        try:
            graph = onnx.load_from_string(model).graph
        except Exception as problem:  # noqa: BLE001
            self._problem = str(problem)
            return False
        network = self._network
        network.model = model
        network.inputs = [_Tensor(value) for value in graph.input]
        network.outputs = [_Tensor(value) for value in graph.output]
        return True

    def get_error(self, _index: int) -> Any:
        problem = self._problem

        class Error:
            def desc(self) -> str:
                return problem

            def node_name(self) -> str:
                return ""

            node_operator = node_name

        return Error()


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *shapes: Sequence[int]) -> None:
        self.shapes[name] = [list(shape) for shape in shapes]


class _TimingCache:
    def serialize(self) -> bytes:
        return b"timings"


class _Config:
    def __init__(self) -> None:
        self.progress_monitor: Any = None
        self.profiles: list[_Profile] = []
        self._cache: Any = None

    def set_memory_pool_limit(self, _pool: Any, _size: int) -> None:
        pass

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, _content: bytes) -> _TimingCache:
        return _TimingCache()

    def set_timing_cache(self, cache: _TimingCache, _ignore: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class Builder:
    def __init__(self, _logger: Any) -> None:
        pass

    def create_network(self, _flags: int) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        shapes = [profile.shapes for profile in config.profiles] or [{}]
        return MAGIC + json.dumps(shapes).encode() + b"\n" + network.model


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if not plan.startswith(MAGIC):
            return None
        head, _, model = plan.partition(b"\n")
        return _Engine(json.loads(head.removeprefix(MAGIC)), _Model(model), self._logger)


class _Engine:
    device_memory_size_v2 = CONTEXT_BYTES
    num_aux_streams = AUX_STREAMS

    def __init__(self, ranges: list[dict[str, Any]], model: _Model, logger: Any) -> None:
        self.logger = logger
        self._ranges = ranges
        self.num_optimization_profiles = len(ranges)
        self.model = model
        self.tensors = [*model.inputs, *model.outputs]
        self._by_name = {tensor.name: tensor for tensor in self.tensors}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        name: str = self.tensors[index].name
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = any(tensor.name == name for tensor in self.model.inputs)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._by_name[name].dtype

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return self._by_name[name].shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        return list(self._ranges[profile].get(name) or [self._by_name[name].shape] * 3)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Any:
        return _Context(self, config)


class RuntimeConfig:
    strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy


class _Context:
    """An execution context, with what a real one has against being used wrongly:

    - A run needs device memory, and streams besides, that the context was given.
    - What a model knows of its inputs' shapes at run time (Shape nodes, what follows of them) is in
      the context, not in the kernels that a graph holds: a graph replays with the shapes that the
      context has by then. (TensorRT's developer guide, "CUDA Graphs".)
    """

    control: ClassVar = Control()

    def __init__(self, engine: _Engine, config: RuntimeConfig) -> None:
        self._engine = engine
        self._model = engine.model
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = 0
        # Not taken from the fake device: an address that nobody else has.
        own = config.strategy is not ExecutionContextAllocationStrategy.USER_MANAGED
        self._memory = id(self) if own else 0
        self._aux_streams: list[int] = []

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self._profile = index
        return index < self._engine.num_optimization_profiles

    def set_device_memory(self, address: int, size: int) -> None:
        if size < CONTEXT_BYTES or address % 256:
            self._log(f"{size} bytes at {address:#x} will not do")
        else:
            self._memory = address

    def set_aux_streams(self, streams: list[int]) -> None:
        self._aux_streams = streams

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(
            low <= dim <= high for low, dim, high in zip(least, shape, most, strict=True)
        ):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self._model.inputs if tensor.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return self._shapes.get(name) or self._model.output_shapes(self._shapes)[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        model, addresses, enqueued = self._model, dict(self._addresses), dict(self._shapes)
        if max(shape[0] for shape in enqueued.values()) > ROWS:
            self._log("[resize.cpp::grow::7] Error Code 2: OutOfMemory (no further information)")
            return False
        if not self._memory:
            self._log("no device memory was set")
            return False
        if len(self._aux_streams) != AUX_STREAMS or stream in self._aux_streams:
            self._log("it would run on streams of its own")
            return False

        def kernel() -> int:
            shapes = dict(self._shapes) if model.reads_shapes else enqueued
            inputs = {
                t.name: on_device(addresses[t.name], shapes[t.name], _NUMPY[t.dtype])
                for t in model.inputs
            }
            for tensor in model.outputs:
                found = model.run(inputs)[tensor.name]
                if found.dtype.kind == "f":
                    found *= FACTOR
                dtype = _NUMPY[tensor.dtype]
                on_device(addresses[tensor.name], found.shape, dtype)[...] = found
            return 0

        return self.control.launch(stream, kernel) == 0

    def _log(self, error: str) -> None:
        self._engine.logger.log(ILogger.ERROR, error)
