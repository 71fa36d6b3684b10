"""Lanes of a loaded plan: an execution context each, and the memory that they take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from inferq.shared.errors import ConfigError, EngineError
from inferq.workers.cuda.buffers import nbytes
from inferq.workers.cuda.device import Device
from inferq.workers.cuda.lane import CudaLane, RowLimit, Shape
from inferq.workers.trt.flavours import Context, Loaded

logger = logging.getLogger(__name__)

_MB: Final = 1e6


def open_lanes(
    gpu: Device,
    loaded: Loaded,
    lanes: list[CudaLane],
    *,
    count: int,
    buckets: Sequence[int],
    own_graphs: bool,
    cuda_graphs: bool,
) -> None:
    """Add `count` lanes for the plan to `lanes`; what it takes is logged before it is taken.

    `own_graphs`: TensorRT captures CUDA graphs by itself; `cuda_graphs`: the lanes do. Raises
    ConfigError, saying what would fit, if the GPU's memory does not suffice.
    """
    inputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if tensor.is_input}
    outputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if not tensor.is_input}
    largest = {name: loaded.range(name).max for name in inputs}
    limit = RowLimit()
    context_bytes = loaded.context_bytes
    check_memory(gpu, count, context_bytes, buckets)
    # Only a context can tell how large the outputs are.
    first = _Executor(loaded.context(graphs=own_graphs), list(outputs))
    shapes = {**largest, **first.set_shapes(largest)}
    buffers = sum(nbytes(dtype, shapes[name]) for name, dtype in {**inputs, **outputs}.items())
    free, total = gpu.memory()
    logger.info(
        "%d lanes of %.1f MB of GPU memory each (%.1f MB for tensors, %.1f MB for TensorRT), and "
        "%.1f MB of pinned memory; %.0f of %.0f MB of the GPU are free",
        count, (context_bytes + buffers) / _MB, buffers / _MB, context_bytes / _MB, buffers / _MB,
        (free + context_bytes) / _MB, total / _MB,
    )  # fmt: skip
    check_memory(gpu, count, context_bytes + buffers, buckets, taken=context_bytes)
    for number in range(count):
        executor = first
        if number:
            executor = _Executor(loaded.context(graphs=own_graphs), list(outputs))
        lanes.append(
            CudaLane(
                gpu, executor, inputs, outputs, largest, limit,
                buckets=buckets, graphs=cuda_graphs,
            )
        )  # fmt: skip


def check_memory(
    gpu: Device, count: int, each: int, buckets: Sequence[int], taken: int = 0
) -> None:
    """ConfigError unless `count` lanes of `each` bytes fit, `taken` of which are taken already.

    What a smaller batch would take is estimated: in proportion to its rows.
    """
    free, total = gpu.memory()
    free += taken
    if count * each <= free:
        return
    advice = [f"lanes = {free // each}"] if each <= free else []
    fitting = [size for size in buckets if count * each * size <= free * buckets[-1]]
    if fitting:
        advice.append(f"max_batch_size = {fitting[-1]}")
    raise ConfigError(
        f"{count} lanes take {each / _MB:.1f} MB of GPU memory each, {free / _MB:.1f} of "
        f"{total / _MB:.1f} MB are free; expected in model.toml: "
        f"{' or '.join(advice) or 'less than one lane with batches of one row, or a larger GPU'}"
    )


class _Executor:
    """One execution context."""

    def __init__(self, context: Context, outputs: Sequence[str]) -> None:
        self._context: Context | None = context
        self._outputs = outputs

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        context = self._open
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        context.infer_shapes()
        found = {name: context.shape(name) for name in self._outputs}
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the inputs' values")
        return found

    def set_address(self, name: str, address: int) -> None:
        self._open.set_address(name, address)

    def enqueue(self, stream: int) -> None:
        self._open.execute(stream)

    def close(self) -> None:
        self._context = None

    @property
    def _open(self) -> Context:
        if self._context is None:
            raise EngineError("the lane is closed")
        return self._context
