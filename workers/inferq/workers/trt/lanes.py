"""Lanes of a loaded plan: an execution context each, and the memory that they take."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from inferq.shared.errors import ConfigError, EngineError, InvalidInput
from inferq.shared.schema import Array, Tensors
from inferq.workers.cuda import device
from inferq.workers.cuda.buffers import nbytes
from inferq.workers.cuda.device import Device
from inferq.workers.cuda.graphs import Graph
from inferq.workers.cuda.lane import CudaLane, RowLimit, Shape
from inferq.workers.engines.base import Batch, Lane
from inferq.workers.trt.flavours import Context, Flavour, InputRange, Loaded
from inferq.workers.trt.verify import Run

logger = logging.getLogger(__name__)

_MB: Final = 1e6


def open_lanes(
    gpu: Device,
    loaded: Loaded,
    lanes: list[CudaLane],
    *,
    count: int,
    buckets: Sequence[int],
    own_graphs: bool = False,
    cuda_graphs: bool = False,
    runtime_cache: bytes | None = None,
) -> Context:
    """Add `count` lanes for the plan to `lanes`; what it takes is logged before it is taken.

    `buckets`: the batch sizes that it runs at, ascending; empty: any. `own_graphs`: TensorRT
    captures CUDA graphs by itself; `cuda_graphs`: the lanes do. `runtime_cache`: see
    `Loaded.context`. Returns the first lane's context. Raises ConfigError, saying what would fit,
    if the GPU's memory does not suffice.
    """

    def executor() -> _Executor:
        context = loaded.context(graphs=own_graphs, runtime_cache=runtime_cache)
        return _Executor(context, ranges, list(outputs))

    inputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if tensor.is_input}
    outputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if not tensor.is_input}
    ranges = [loaded.range(name) for name in inputs]
    largest = {span.name: span.max for span in ranges}
    limit = RowLimit()
    context_bytes = loaded.context_bytes
    check_memory(gpu, count, context_bytes, buckets)
    # Only a context can tell how large the outputs are.
    first = executor()
    try:
        shapes = {**largest, **first.set_shapes(largest)}
        buffers = sum(nbytes(dtype, shapes[name]) for name, dtype in {**inputs, **outputs}.items())
        free, total = gpu.memory()
        logger.info(
            "%d lanes of %.1f MB of GPU memory each (%.1f MB for tensors, %.1f MB for TensorRT), "
            "and %.1f MB of pinned memory; %.0f of %.0f MB of the GPU are free",
            count, (context_bytes + buffers) / _MB, buffers / _MB, context_bytes / _MB,
            buffers / _MB, (free + context_bytes) / _MB, total / _MB,
        )  # fmt: skip
        check_memory(gpu, count, context_bytes + buffers, buckets, taken=context_bytes)
    except BaseException:
        first.close()
        raise
    for number in range(count):
        lanes.append(
            CudaLane(
                gpu, executor() if number else first, inputs, outputs, largest, limit,
                buckets=buckets, graphs=cuda_graphs,
            )
        )  # fmt: skip
    return first.context


def check_memory(
    gpu: Device, count: int, each: int, buckets: Sequence[int], taken: int = 0
) -> None:
    """ConfigError unless `count` lanes of `each` bytes fit, `taken` of which are taken already.

    What a smaller batch would take is estimated: in proportion to its rows.
    """
    free, total = gpu.memory()
    free = min(total, free + taken)  # a context may take its memory later than it says
    if count * each <= free:
        return
    advice = [f"lanes = {free // each}"] if each <= free else []
    fitting = [size for size in buckets if count * each * size <= free * buckets[-1]]
    if fitting:  # none: also where any size may come
        advice.append(f"max_batch_size = {fitting[-1]}")
    raise ConfigError(
        f"{count} lanes take {each / _MB:.1f} MB of GPU memory each, {free / _MB:.1f} of "
        f"{total / _MB:.1f} MB are free; expected in model.toml: "
        f"{' or '.join(advice) or 'less than one lane with batches of one row, or a larger GPU'}"
    )


def runs_on(lane: Lane, *, batchable: bool) -> Run:
    """A function that runs one request's inputs on `lane`."""

    def run(inputs: Tensors) -> Mapping[str, Array]:
        rows = len(next(iter(inputs.values()))) if batchable else 1
        return lane.run(Batch([inputs], rows, rows, batchable))

    return run


@contextmanager
def loaded_once(flavour: Flavour, plan: bytes, *, batchable: bool) -> Iterator[Run]:
    """A function that runs `plan` on a lane of its own, until the end. ConfigError, EngineError,
    FatalEngineError.
    """
    gpu = device.acquire()
    lanes: list[CudaLane] = []
    loaded: Loaded | None = None
    try:
        with gpu:
            loaded = flavour.deserialize(plan)
            open_lanes(gpu, loaded, lanes, count=1, buckets=())
        yield runs_on(lanes[0], batchable=batchable)
    except Exception as problem:
        judged = gpu.judge_loading(problem)
        if judged is problem:
            raise
        raise judged from problem
    finally:
        for lane in lanes:
            lane.close()
        with gpu:
            if loaded is not None:
                loaded.close()
        device.release()


class _Executor:
    """One execution context; `ranges`: what its inputs may be."""

    def __init__(
        self, context: Context, ranges: Sequence[InputRange], outputs: Sequence[str]
    ) -> None:
        self.context = context
        self._ranges = ranges
        self._outputs = outputs

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        context = self.context
        for span in self._ranges:
            _check_shape(span, shapes[span.name])
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        context.infer_shapes()
        found = {name: context.shape(name) for name in self._outputs}
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the inputs' values")
        return found

    def set_address(self, name: str, address: int) -> None:
        self.context.set_address(name, address)

    def enqueue(self, stream: int) -> None:
        self.context.execute(stream)

    def capture(self, stream: int) -> Graph:
        return Graph(stream, lambda: self.context.execute(stream))

    def close(self) -> None:
        self.context.close()


def _check_shape(span: InputRange, shape: Shape) -> None:
    """InvalidInput: the plan was not built for it. [profile] is not told to clients otherwise."""
    axes = zip(span.min, shape, span.max, strict=True)
    for axis, (least, size, most) in enumerate(axes):
        if not least <= size <= most:
            raise InvalidInput(
                f"input {span.name!r}: dim {axis} is {size}; expected {least} to {most}, for which "
                "the model was built ([profile] of model.toml)"
            )
