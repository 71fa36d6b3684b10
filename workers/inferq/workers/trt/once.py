"""Runs a plan on the GPU at hand, one call at a time: to verify it, not to serve it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array, Tensors
from inferq.workers.trt.device import current_context, pop_context
from inferq.workers.trt.flavours import Context, Flavour, IOTensor, Loaded
from inferq.workers.trt.verify import Run

#: CU_STREAM_NON_BLOCKING.
_NON_BLOCKING: Final = 1


@contextmanager
def loaded(flavour: Flavour, plan: bytes, device: int = 0) -> Iterator[Run]:
    """A function that runs `plan` on GPU `device`: inputs → outputs, synchronously.

    To be used in the thread that made it. ConfigError: the plan cannot be loaded there;
    EngineError: CUDA failed.
    """
    import pycuda.driver as cuda  # noqa: PLC0415 (needs the driver)

    try:
        cuda.init()
        primary = cuda.Device(device).retain_primary_context()
        primary.push()
        runner = _Runner(cuda)
        try:
            runner.open(flavour, plan)
            yield runner.run
        finally:
            runner.close()
            primary.pop()
            before = current_context()
            # Its destructor would take it for a context of its own.
            primary.detach()
            # To release it PyCUDA made it current again, and the driver does not undo that.
            if current_context() != before:
                pop_context()
    except cuda.Error as problem:
        raise EngineError(f"CUDA: {problem}") from problem


class _Runner:
    """What lives on the GPU. `close` frees it while the CUDA context is still there."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._engine: Loaded | None = None
        self._context: Context | None = None
        self._stream: Any = None

    def open(self, flavour: Flavour, plan: bytes) -> None:
        self._stream = self._cuda.Stream(_NON_BLOCKING)
        self._engine = flavour.deserialize(plan)
        self._context = self._engine.context()
        if self._engine.profiles:
            self._context.set_profile(0, self._stream.handle)
            self._stream.synchronize()

    def close(self) -> None:
        # A traceback may hold on to whatever was at work.
        if self._context is not None:
            self._context.close()
        if self._engine is not None:
            self._engine.close()
        self._context = self._engine = self._stream = None

    def run(self, inputs: Tensors) -> Mapping[str, Array]:
        engine, context = self._engine, self._context
        assert engine is not None
        assert context is not None
        for tensor in engine.tensors:
            if tensor.is_input:
                context.set_shape(tensor.name, inputs[tensor.name].shape)
        context.infer_shapes()
        memories: dict[str, Any] = {}
        try:
            for tensor in engine.tensors:
                memories[tensor.name] = self._place(tensor, context)
                if tensor.is_input:
                    content = np.ascontiguousarray(inputs[tensor.name])
                    self._cuda.memcpy_htod(memories[tensor.name], content)
            context.execute(self._stream.handle)
            self._stream.synchronize()
            outputs: dict[str, Array] = {}
            for tensor in engine.tensors:
                if not tensor.is_input:
                    array = np.empty(context.shape(tensor.name), tensor.dtype)
                    self._cuda.memcpy_dtoh(array, memories[tensor.name])
                    outputs[tensor.name] = array
            return outputs
        finally:
            for memory in memories.values():
                memory.free()

    def _place(self, tensor: IOTensor, context: Context) -> Any:
        size = math.prod(context.shape(tensor.name)) * tensor.dtype.itemsize
        memory = self._cuda.mem_alloc(max(1, size))
        context.set_address(tensor.name, int(memory))
        return memory
