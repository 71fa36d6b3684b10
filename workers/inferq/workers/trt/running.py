"""Loads plans onto the GPU; a plan there and its execution contexts, as TensorRT's API has them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferq.shared.errors import ConfigError, EngineError
from inferq.workers.models.engine import OutOfDeviceMemory
from inferq.workers.models.ranges import InputRange, Shape
from inferq.workers.trt.api import RTX, USED_ONLY
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.gil import Calls
from inferq.workers.trt.logs import is_out_of_memory, joined

logger = logging.getLogger(__name__)


def why_unusable(flavour: Flavour, plan: bytes) -> str | None:
    """Why `plan` cannot run on the GPU at hand, as far as its header tells; else None."""
    if flavour.name != RTX:
        return None
    validity, found = flavour.runtime.get_engine_validity(plan)
    if validity == flavour.trt.EngineValidity.SUBOPTIMAL:
        logger.warning("the plan may run slowly on this GPU")
    if validity != flavour.trt.EngineValidity.INVALID:
        return None
    bits = flavour.trt.EngineInvalidityDiagnostics
    reasons = [
        name.lower().replace("_", " ")
        for name in USED_ONLY[RTX]["EngineInvalidityDiagnostics"]
        if int(found) & int(getattr(bits, name))
    ]
    return ", ".join(reasons) or "no GPU that it could run on"


def deserialize(flavour: Flavour, plan: bytes, runtime_cache: bytes | None = None) -> Loaded:
    """`plan` on the current CUDA context. A plan is code: only of `Plan.load`. ConfigError.

    `runtime_cache`: what `Loaded.runtime_cache` returned in an earlier process, where the flavour
    has one.
    """
    with flavour.errors.loading() as errors:
        engine = flavour.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            reason = why_unusable(flavour, plan)
            what = "could not load the plan" + (f" ({reason})" if reason else "")
            raise ConfigError(flavour.failed(what, errors))
    return Loaded(flavour, engine, runtime_cache)


@dataclass(frozen=True)
class IOTensor:
    """An input or output of a loaded plan. Open dims of `shape` are -1."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    shape: Shape


class Loaded:
    """A plan on the GPU. Close it, after its contexts, while the CUDA context is current."""

    def __init__(self, flavour: Flavour, engine: Any, runtime_cache: bytes | None = None) -> None:
        self._flavour = flavour
        self._engine = engine
        self.calls = Calls()
        self.tensors = tuple(map(self._tensor, range(engine.num_io_tensors)))
        #: Optimization profiles.
        self.profiles: int = engine.num_optimization_profiles
        #: Bytes of device memory that any of its contexts needs while it runs, tensors not counted.
        self.context_bytes: int = engine.device_memory_size_v2
        #: How many streams a context runs on besides the one that it is given.
        self.aux_streams: int = engine.num_aux_streams
        self._cache = self._runtime_cache(runtime_cache) if flavour.has_runtime_cache else None

    def _tensor(self, index: int) -> IOTensor:
        trt, engine = self._flavour.trt, self._engine
        name = engine.get_tensor_name(index)
        return IOTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=np.dtype(self._flavour.dtype_name(name, engine.get_tensor_dtype(name))),
            shape=tuple(engine.get_tensor_shape(name)),
        )

    def _runtime_cache(self, content: bytes | None) -> Any:
        """One for all contexts: what one of them has compiled, the others take from there."""
        cache = self._engine.create_runtime_config().create_runtime_cache()
        if content and not cache.deserialize(content):
            logger.info("the runtime cache is of another GPU, driver or version: compiling")
        return cache

    def close(self) -> None:
        """Free it, whoever else still holds this object. Idempotent."""
        with self.calls.keeping_the_gil:
            self._engine = self._cache = None

    def range(self, name: str, profile: int = 0) -> InputRange:
        """What input `name` may be in `profile`."""
        shapes = self._engine.get_tensor_profile_shape(name, profile)
        least, best, most = (tuple(shape) for shape in shapes)
        return InputRange(name, least, best, most)

    def context(self, *, graphs: bool = False) -> Context:
        """A new execution context, which has no device memory yet. EngineError.

        `graphs`: it captures CUDA graphs by itself, where the flavour has that.
        """
        with self.calls.giving_up_the_gil, self._flavour.errors.loading() as errors:
            config = self._config(graphs=graphs)
            context = self._engine.create_execution_context(config)
            if context is None:
                raise _error(
                    self._flavour.failed("could not create an execution context", errors), errors
                )
        return Context(self._flavour, self, context, config)

    def _config(self, *, graphs: bool) -> Any:
        trt = self._flavour.trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._flavour.name == RTX:
            # Otherwise it compiles kernels in a thread of its own while others run in their place:
            # the warm-up would measure those, and that thread's log needs the GIL, which whoever
            # destroys the context holds while it waits for that thread.
            kernels = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        if graphs and self._flavour.has_own_graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is not None:
            config.set_runtime_cache(self._cache)
        return config

    def runtime_cache(self) -> bytes | None:
        """What was compiled up to now, for later processes; None where the flavour has none."""
        with self.calls.keeping_the_gil:
            content = None if self._cache is None else self._cache.serialize()
            return bytes(content) if content is not None and content.nbytes else None


class Context:
    """One execution context. Streams and addresses are plain integers.

    Give it memory before it runs. Close it before its plan, while the CUDA context is current. All
    but `shape` raise EngineError.
    """

    def __init__(self, flavour: Flavour, loaded: Loaded, context: Any, config: Any) -> None:
        self._flavour = flavour
        # The plan and what it was made with have to outlive the context.
        self._loaded = loaded
        self._config = config
        self._context = context
        self._calls = loaded.calls
        self._addresses: dict[str, int] = {}

    def close(self) -> None:
        """Free it, while the CUDA context is current and nothing of it runs. Idempotent."""
        with self._calls.keeping_the_gil:
            self._context = self._config = None

    def set_profile(self, index: int, stream: int) -> None:
        """Take optimization profile `index`; in force once `stream` has got there."""
        errors = self._flavour.errors.begin()
        with self._calls.keeping_the_gil:
            done = self._context.set_optimization_profile_async(index, stream)
        if not done:
            raise self._refused(f"profile {index}", errors)

    def set_memory(self, address: int, size: int) -> None:
        """What it computes in: contexts that never run at the same time may share it."""
        errors = self._flavour.errors.begin()
        with self._calls.keeping_the_gil:
            self._context.set_device_memory(address, size)
        if errors:  # it answers nothing
            raise self._refused(f"device memory of {size} bytes", errors)

    def set_aux_streams(self, streams: Sequence[int]) -> None:
        """Take these, `Loaded.aux_streams` of them, in place of streams of its own."""
        errors = self._flavour.errors.begin()
        with self._calls.keeping_the_gil:
            self._context.set_aux_streams(list(streams))
        if errors:  # it answers nothing
            raise self._refused(f"{len(streams)} streams", errors)

    def set_shape(self, name: str, shape: Shape) -> None:
        """Give input `name` its whole shape, within the profile."""
        errors = self._flavour.errors.begin()
        with self._calls.keeping_the_gil:
            done = self._context.set_input_shape(name, shape)
        if not done:
            raise self._refused(f"shape of {name!r} {shape}", errors)

    def infer_shapes(self) -> None:
        """Work out the outputs' shapes, once all inputs have theirs."""
        with self._calls.giving_up_the_gil:
            missing = self._context.infer_shapes()
        if missing:
            raise EngineError(f"{self._flavour.name}: no shape was set of {', '.join(missing)}")

    def shape(self, name: str) -> Shape:
        """The shape of tensor `name`; -1 where it is not known before the run (data-dependent)."""
        with self._calls.keeping_the_gil:
            return tuple(self._context.get_tensor_shape(name))

    def set_address(self, name: str, address: int) -> None:
        """Where tensor `name` is in device memory."""
        if self._addresses.get(name) == address:
            return
        errors = self._flavour.errors.begin()
        with self._calls.keeping_the_gil:
            done = self._context.set_tensor_address(name, address)
        if not done:
            raise self._refused(f"address of {name!r}", errors)
        self._addresses[name] = address

    def execute(self, stream: int) -> None:
        """Enqueue one run on `stream` (not the default stream). OutOfDeviceMemory."""
        errors = self._flavour.errors.begin()
        with self._calls.giving_up_the_gil:
            done = self._context.execute_async_v3(stream)
        if not done:
            raise _error(f"{self._flavour.name}: {joined(errors)}", errors)

    def _refused(self, what: str, errors: Sequence[str]) -> EngineError:
        return _error(f"{self._flavour.name} refused the {what}: {joined(errors)}", errors)


def _error(message: str, errors: Sequence[str]) -> EngineError:
    """What a call raises that failed with these `errors`."""
    return OutOfDeviceMemory(message) if is_out_of_memory(errors) else EngineError(message)
