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


def deserialize(flavour: Flavour, plan: bytes) -> Loaded:
    """`plan` on the current CUDA context. A plan is code: only of `Plan.load`. ConfigError."""
    with flavour.errors.loading() as errors:
        engine = flavour.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            reason = why_unusable(flavour, plan)
            what = "could not load the plan" + (f" ({reason})" if reason else "")
            raise ConfigError(flavour.failed(what, errors))
    return Loaded(flavour, engine)


@dataclass(frozen=True)
class IOTensor:
    """An input or output of a loaded plan. Open dims of `shape` are -1."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    shape: Shape


class Loaded:
    """A plan on the GPU. Close it, after its contexts, while the CUDA context is current."""

    def __init__(self, flavour: Flavour, engine: Any) -> None:
        self._flavour = flavour
        self._engine = engine
        self.tensors = tuple(map(self._tensor, range(engine.num_io_tensors)))
        #: Optimization profiles.
        self.profiles: int = engine.num_optimization_profiles
        #: Bytes of device memory that each of its contexts takes, tensors not counted.
        self.context_bytes: int = engine.device_memory_size_v2

    def _tensor(self, index: int) -> IOTensor:
        trt, engine = self._flavour.trt, self._engine
        name = engine.get_tensor_name(index)
        return IOTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=np.dtype(self._flavour.dtype_name(name, engine.get_tensor_dtype(name))),
            shape=tuple(engine.get_tensor_shape(name)),
        )

    def close(self) -> None:
        """Free it, whoever else still holds this object. Idempotent."""
        self._engine = None

    def range(self, name: str, profile: int = 0) -> InputRange:
        """What input `name` may be in `profile`."""
        shapes = self._engine.get_tensor_profile_shape(name, profile)
        least, best, most = (tuple(shape) for shape in shapes)
        return InputRange(name, least, best, most)

    def context(self, *, graphs: bool = False, runtime_cache: bytes | None = None) -> Context:
        """A new execution context; its device memory is taken now. EngineError.

        Where the flavour has them: `graphs` has it capture CUDA graphs by itself, and
        `runtime_cache` is what `Context.runtime_cache` returned in an earlier process.
        """
        trt = self._flavour.trt
        config, cache = self._engine.create_runtime_config(), None
        if graphs and self._flavour.has_own_graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._flavour.has_runtime_cache:
            cache = config.create_runtime_cache()
            if runtime_cache and not cache.deserialize(runtime_cache):
                logger.info("the runtime cache is of another GPU, driver or version: compiling")
            config.set_runtime_cache(cache)
        with self._flavour.errors.loading() as errors:
            context = self._engine.create_execution_context(config)
            if context is None:
                raise _error(
                    self._flavour.failed("could not create an execution context", errors), errors
                )
        return Context(self._flavour, self, context, cache)


class Context:
    """One execution context: one lane's. Streams and addresses are plain integers.

    Close it before its plan, while the CUDA context is current.

    `set_shape` and `set_address` hold the GIL: call them when the batch size changes, not per
    batch. `execute` and `infer_shapes` release it. All but `shape` raise EngineError.
    """

    def __init__(self, flavour: Flavour, loaded: Loaded, context: Any, cache: Any) -> None:
        self._flavour = flavour
        # The plan and the cache have to outlive the context.
        self._loaded = loaded
        self._cache = cache
        self._context = context

    def close(self) -> None:
        """Free it, while the CUDA context is current and nothing of it runs. Idempotent."""
        self._context = self._cache = None

    def set_profile(self, index: int, stream: int) -> None:
        """Take optimization profile `index`; in force once `stream` has got there."""
        errors = self._flavour.errors.begin()
        if not self._context.set_optimization_profile_async(index, stream):
            raise self._refused(f"profile {index}", errors)

    def set_shape(self, name: str, shape: Shape) -> None:
        """Give input `name` its whole shape, within the profile."""
        errors = self._flavour.errors.begin()
        if not self._context.set_input_shape(name, shape):
            raise self._refused(f"shape of {name!r} {shape}", errors)

    def infer_shapes(self) -> None:
        """Work out the outputs' shapes, once all inputs have theirs."""
        missing = self._context.infer_shapes()
        if missing:
            raise EngineError(f"{self._flavour.name}: no shape was set of {', '.join(missing)}")

    def shape(self, name: str) -> Shape:
        """The shape of tensor `name`; -1 where it is not known before the run (data-dependent)."""
        return tuple(self._context.get_tensor_shape(name))

    def set_address(self, name: str, address: int) -> None:
        """Where tensor `name` is in device memory."""
        errors = self._flavour.errors.begin()
        if not self._context.set_tensor_address(name, address):
            raise self._refused(f"address of {name!r}", errors)

    def execute(self, stream: int) -> None:
        """Enqueue one run on `stream` (not the default stream). OutOfDeviceMemory."""
        errors = self._flavour.errors.begin()
        if not self._context.execute_async_v3(stream):
            raise _error(f"{self._flavour.name}: {joined(errors)}", errors)

    def is_capturable(self, stream: int) -> bool:
        """Whether a CUDA graph may be captured of `execute` on `stream` now."""
        if self._flavour.name != RTX:
            return True
        return bool(self._context.is_stream_capturable(stream))

    def runtime_cache(self) -> bytes | None:
        """What was compiled up to now, for later processes; None where the flavour has none."""
        if self._cache is None:
            return None
        content = self._cache.serialize()
        return bytes(content) if content is not None and content.nbytes else None

    def _refused(self, what: str, errors: Sequence[str]) -> EngineError:
        return _error(f"{self._flavour.name} refused the {what}: {joined(errors)}", errors)


def _error(message: str, errors: Sequence[str]) -> EngineError:
    """What a call raises that failed with these `errors`."""
    return OutOfDeviceMemory(message) if is_out_of_memory(errors) else EngineError(message)
