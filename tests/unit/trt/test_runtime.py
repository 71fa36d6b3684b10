"""What a lane calls of a plan, on a double of TensorRT: calls arrive, refusals are EngineErrors."""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np
import pytest

from inferq.shared.errors import ConfigError, EngineError
from inferq.workers.models.engine import OutOfDeviceMemory
from inferq.workers.models.ranges import InputRange
from inferq.workers.trt.api import RTX, TENSORRT
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.running import Context, Loaded, deserialize, why_unusable


class _Blob(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class _Double:
    """Both flavours' run-time calls; `refuses` names those that answer False or None."""

    def __init__(self) -> None:  # noqa: C901 - a function for each call of the API
        self.calls: list[tuple[Any, ...]] = []
        #: Those that contexts were made with.
        self.configs: list[Any] = []
        self.refuses: set[str] = set()
        #: What is logged of it.
        self.says = "refused"
        self.log: Any = None
        double = self

        def called(name: str, *given: Any, answer: Any = True) -> Any:
            double.calls.append((name, *given))
            if name in double.refuses:
                double.log.log("error", f"{name}\n  {double.says}")
                return None if answer is not True else False
            return answer

        class Logger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = "fatal", "error", "w", "i", "v"

            def __init__(self) -> None:
                double.log = self

        class Cache:
            def deserialize(self, content: bytes) -> bool:
                return bool(called("deserialize cache", content))

            def serialize(self) -> _Blob:
                return _Blob(b"compiled")

        class Config:
            cuda_graph_strategy = "disabled"
            dynamic_shapes_kernel_specialization_strategy = "lazy"
            memory = "its own"

            def set_execution_context_allocation_strategy(self, strategy: str) -> None:
                self.memory = strategy

            def create_runtime_cache(self) -> Cache:
                return Cache()

            def set_runtime_cache(self, cache: Cache) -> bool:
                return bool(called("set_runtime_cache", cache))

        class Execution:
            def __getattr__(self, name: str) -> Any:
                return lambda *given: called(name, *given)

            def infer_shapes(self) -> list[str]:
                return ["x"] if "infer_shapes" in double.refuses else []

            def get_tensor_shape(self, name: str) -> list[int]:
                return [4, -1]

        class Engine:
            num_io_tensors, num_optimization_profiles, device_memory_size_v2 = 2, 1, 512
            num_aux_streams = 3

            def get_tensor_name(self, index: int) -> str:
                return "xy"[index]

            def get_tensor_mode(self, name: str) -> str:
                return {"x": "input", "y": "output"}[name]

            def get_tensor_dtype(self, name: str) -> str:
                return {"x": "u1", "y": "f2"}[name]

            def get_tensor_shape(self, name: str) -> list[int]:
                return [-1, 3]

            def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
                return [[1, 3], [4, 3], [8, 3]]

            def create_runtime_config(self) -> Config:
                return Config()

            def create_execution_context(self, config: Config) -> Any:
                double.configs.append(config)
                return called("create_execution_context", answer=Execution())

        class Runtime:
            def __init__(self, logger: Any) -> None: ...

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                return called("deserialize_cuda_engine", plan, answer=Engine())

            def get_engine_validity(self, plan: bytes) -> tuple[str, int]:
                return ("invalid", 3) if plan == b"old" else ("valid", 0)

        self.module = types.SimpleNamespace(
            __version__="1.0",
            ILogger=Logger,
            Runtime=Runtime,
            DataType=types.SimpleNamespace(
                FLOAT="f4", HALF="f2", INT8="i1", INT32="i4", INT64="i8", UINT8="u1", BOOL="b"
            ),
            TensorIOMode=types.SimpleNamespace(INPUT="input"),
            ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="ours"),
            DynamicShapesKernelSpecializationStrategy=types.SimpleNamespace(EAGER="eager"),
            CudaGraphStrategy=types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
            EngineValidity=types.SimpleNamespace(INVALID="invalid", SUBOPTIMAL="so so"),
            EngineInvalidityDiagnostics=types.SimpleNamespace(
                VERSION_MISMATCH=1,
                UNSUPPORTED_CC=2,
                OLD_CUDA_DRIVER=4,
                OLD_CUDA_RUNTIME=8,
                INSUFFICIENT_GPU_MEMORY=16,
                MALFORMED_ENGINE=32,
                CUDA_ERROR=64,
            ),
        )

    def loaded(self, name: str = RTX, runtime_cache: bytes | None = None) -> Loaded:
        return deserialize(Flavour(name, self.module), b"plan", runtime_cache)

    def context(self) -> Context:
        return self.loaded().context()


@pytest.fixture
def double() -> _Double:
    return _Double()


def test_a_plan_tells_its_tensors(double: _Double) -> None:
    loaded = double.loaded()
    x, y = loaded.tensors
    assert (x.name, x.is_input, x.dtype, x.shape) == ("x", True, np.dtype("u1"), (-1, 3))
    assert (y.name, y.is_input, y.dtype) == ("y", False, np.dtype("f2"))
    assert (loaded.profiles, loaded.context_bytes, loaded.aux_streams) == (1, 512, 3)
    assert loaded.range("x") == InputRange("x", (1, 3), (4, 3), (8, 3))


def test_a_plan_that_does_not_load_says_why(double: _Double) -> None:
    double.refuses.add("deserialize_cuda_engine")
    with pytest.raises(ConfigError, match="could not load the plan: deserialize_cuda_engine ref"):
        double.loaded()
    with pytest.raises(ConfigError, match=r"\(version mismatch, unsupported cc\)"):
        deserialize(Flavour(RTX, double.module), b"old")
    assert why_unusable(Flavour(RTX, double.module), b"new") is None
    assert why_unusable(Flavour(TENSORRT, double.module), b"old") is None


def test_what_a_lane_calls_arrives(double: _Double) -> None:
    context = double.context()
    double.calls.clear()
    context.set_profile(0, 7)
    context.set_memory(1024, 512)
    context.set_aux_streams([8, 9])
    context.set_shape("x", (4, 3))
    context.infer_shapes()
    assert context.shape("y") == (4, -1)
    for address in (4096, 4096, 8192):
        context.set_address("y", address)
    context.execute(7)
    assert double.calls == [
        ("set_optimization_profile_async", 0, 7),
        ("set_device_memory", 1024, 512),
        ("set_aux_streams", [8, 9]),
        ("set_input_shape", "x", (4, 3)),
        ("set_tensor_address", "y", 4096),
        ("set_tensor_address", "y", 8192),
        ("execute_async_v3", 7),
    ]


@pytest.mark.parametrize(
    ("refused", "call", "problem"),
    [
        ("set_optimization_profile_async", lambda c: c.set_profile(1, 7), "refused the profile 1"),
        ("set_device_memory", lambda c: c.set_memory(4, 9), "refused the device memory of 9 bytes"),
        ("set_aux_streams", lambda c: c.set_aux_streams([8]), "refused the 1 streams: set_aux"),
        ("set_input_shape", lambda c: c.set_shape("x", (9,)), r"the shape of 'x' \(9,\): set_in"),
        ("infer_shapes", lambda c: c.infer_shapes(), "no shape was set of x"),
        ("set_tensor_address", lambda c: c.set_address("y", 1), "the address of 'y': set_tensor"),
        ("execute_async_v3", lambda c: c.execute(7), "tensorrt-rtx: execute_async_v3 refused"),
    ],
)
def test_a_refusal_is_an_engine_error_with_what_was_logged(
    double: _Double, refused: str, call: Any, problem: str
) -> None:
    context = double.context()
    double.refuses.add(refused)
    with pytest.raises(EngineError, match=problem):
        call(context)


def test_memory_that_is_short_while_it_runs_is_told_as_that(double: _Double) -> None:
    """So the batch is split; the error of an earlier call, or of another lane, does not count."""
    context = double.context()
    double.refuses.add("execute_async_v3")
    double.says = "Error Code 2: OutOfMemory (no further information)"
    with pytest.raises(OutOfDeviceMemory, match=r"tensorrt-rtx: execute_async_v3 Error Code 2: Ou"):
        context.execute(7)
    double.says = "refused"
    with pytest.raises(EngineError, match=r"execute_async_v3 refused$") as raised:
        context.execute(7)
    assert not isinstance(raised.value, OutOfDeviceMemory)
    thread = threading.Thread(target=double.log.log, args=("error", "out of memory"))
    thread.start()
    thread.join()
    with pytest.raises(EngineError, match=r"rtx: execute_async_v3 refused$"):
        context.execute(7)


def test_no_context_is_an_engine_error(double: _Double) -> None:
    double.refuses.add("create_execution_context")
    with pytest.raises(EngineError, match="could not create an execution context: create_exec"):
        double.context()


def test_rtx_captures_graphs_by_itself_if_it_is_told_to(double: _Double) -> None:
    double.loaded().context(graphs=True)
    double.loaded().context()
    double.loaded(TENSORRT).context(graphs=True)
    told = [each.cuda_graph_strategy for each in double.configs]
    assert told == ["whole", "disabled", "disabled"]


def test_a_context_takes_no_device_memory_of_its_own(double: _Double) -> None:
    """A lane's contexts share one block: one context for each graph would fill the card."""
    double.loaded().context()
    double.loaded(TENSORRT).context()
    assert [each.memory for each in double.configs] == ["ours", "ours"]


def test_rtx_compiles_a_shapes_kernels_before_it_runs_it(double: _Double) -> None:
    """The warm-up measures what will run; no thread of its own compiles, and logs, meanwhile."""
    double.loaded().context()
    assert double.configs[0].dynamic_shapes_kernel_specialization_strategy == "eager"


def test_what_rtx_compiled_can_be_kept(double: _Double) -> None:
    loaded = double.loaded()
    assert loaded.runtime_cache() == b"compiled"
    double.refuses.add("deserialize cache")
    assert double.loaded(runtime_cache=b"compiled").runtime_cache() == b"compiled"
    assert ("deserialize cache", b"compiled") in double.calls
    assert double.loaded(TENSORRT, runtime_cache=b"x").runtime_cache() is None


def test_what_one_context_of_rtx_compiled_serves_the_others(double: _Double) -> None:
    loaded = double.loaded()
    for _ in range(3):
        loaded.context()
    caches = {id(call[1]) for call in double.calls if call[0] == "set_runtime_cache"}
    assert len(caches) == 1


def test_what_is_closed_is_closed_twice_without_harm(double: _Double) -> None:
    loaded = double.loaded()
    context = loaded.context()
    for _ in range(2):
        context.close()
        loaded.close()
    assert loaded.runtime_cache() is None
