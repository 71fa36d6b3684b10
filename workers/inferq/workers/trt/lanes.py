"""Lanes of a loaded plan: execution contexts, one for each profile, and the memory they take."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from pycuda import driver

from inferq.shared.errors import ConfigError, EngineError, InvalidInput
from inferq.shared.schema import Array, Tensors
from inferq.workers.cuda import device
from inferq.workers.cuda.device import Device
from inferq.workers.cuda.graphs import Graph
from inferq.workers.cuda.lane import CudaLane, RowLimit, Shape, tensor_bytes
from inferq.workers.engines.base import Batch, Lane
from inferq.workers.ranges import InputRange
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.running import Context, Loaded
from inferq.workers.trt.verify import Run

logger = logging.getLogger(__name__)

_MB: Final = 1e6
_NON_BLOCKING: Final = 1


def open_lanes(
    gpu: Device,
    loaded: Loaded,
    lanes: list[CudaLane],
    *,
    count: int,
    buckets: Sequence[int],
    own_graphs: bool = False,
    cuda_graphs: bool = False,
    runtime_caches: Sequence[bytes | None] = (),
) -> Sequence[Context]:
    """Add `count` lanes for the plan to `lanes`; what it takes is logged before it is taken.

    `buckets`: the batch sizes that it runs at, ascending; empty: any. `own_graphs`: TensorRT
    captures CUDA graphs by itself; `cuda_graphs`: the lanes do. `runtime_caches`: for each profile,
    see `Loaded.context`. Returns the first lane's contexts, one for each profile. Raises
    ConfigError, saying what would fit, if the GPU's memory does not suffice.
    """
    inputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if tensor.is_input}
    outputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if not tensor.is_input}
    profiles = [[loaded.range(name, n) for name in inputs] for n in range(loaded.profiles)]
    caches = runtime_caches or [None] * len(profiles)

    def executor() -> _Executor:
        made = _Executor(profiles, list(outputs))
        try:
            made.open(loaded, own_graphs, caches)
        except BaseException:
            made.close()
            raise
        return made

    largest = [{span.name: span.max for span in ranges} for ranges in profiles]
    limit = RowLimit()
    context_bytes = len(profiles) * loaded.context_bytes
    check_memory(gpu, count, context_bytes, buckets)
    # Only a context can tell how large the outputs are.
    first = executor()
    try:
        buffers = sum(tensor_bytes(first, {**inputs, **outputs}, largest).values())
        free, total = gpu.memory()
        logger.info(
            "%d lanes of %.1f MB of GPU memory each (%.1f MB for tensors, %.1f MB for %d of "
            "TensorRT's contexts), and %.1f MB of pinned memory; %.0f of %.0f MB of the GPU are "
            "free",
            count, (context_bytes + buffers) / _MB, buffers / _MB, context_bytes / _MB,
            len(profiles), buffers / _MB, (free + context_bytes) / _MB, total / _MB,
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
    return first.contexts


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
    """An execution context for each optimization profile; `profiles`: what the inputs may be.

    A run takes the first profile that holds its shapes: they come the smallest first.
    """

    def __init__(self, profiles: Sequence[Sequence[InputRange]], outputs: Sequence[str]) -> None:
        self.contexts: list[Context] = []
        self._profiles = profiles
        self._outputs = outputs
        #: The one whose shapes were set last.
        self._current: Context

    def open(self, loaded: Loaded, graphs: bool, caches: Sequence[bytes | None]) -> None:
        """Take the device memory of all contexts. EngineError; `close` in any case."""
        stream = driver.Stream(_NON_BLOCKING)
        for number, cache in enumerate(caches):
            context = loaded.context(graphs=graphs, runtime_cache=cache)
            self.contexts.append(context)
            if len(caches) > 1:  # a context begins with the first one
                context.set_profile(number, stream.handle)
        stream.synchronize()  # from here on it is in force on any stream

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        (asked, *_) = (shape[0] for shape in shapes.values())
        held = [
            (ranges[0].min[0], ranges[0].max[0])
            for ranges in self._profiles
            if all(span.holds((span.min[0], *shapes[span.name][1:])) for span in ranges)
        ]
        if not held:
            raise _not_held(shapes, self._profiles)
        enough = [max(least, asked) for least, most in held if asked <= most]
        return min(enough) if enough else max(most for _, most in held)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        context = self._current = self._holding(shapes)
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        context.infer_shapes()
        found = {name: context.shape(name) for name in self._outputs}
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the inputs' values")
        return found

    def set_address(self, name: str, address: int) -> None:
        for context in self.contexts:
            context.set_address(name, address)

    def enqueue(self, stream: int) -> None:
        self._current.execute(stream)

    def capture(self, stream: int) -> Graph:
        context = self._current
        return Graph(stream, lambda: context.execute(stream))

    def close(self) -> None:
        for context in self.contexts:
            context.close()

    def _holding(self, shapes: Mapping[str, Shape]) -> Context:
        for context, ranges in zip(self.contexts, self._profiles, strict=True):
            if all(span.holds(shapes[span.name]) for span in ranges):
                return context
        raise _not_held(shapes, self._profiles)


def _not_held(
    shapes: Mapping[str, Shape], profiles: Sequence[Sequence[InputRange]]
) -> InvalidInput:
    """The plan was not built for them. [profile] is not told to clients otherwise."""
    if len(profiles) == 1:
        for span in profiles[0]:
            axes = zip(span.min, shapes[span.name], span.max, strict=True)
            for axis, (least, size, most) in enumerate(axes):
                if not least <= size <= most:
                    return InvalidInput(
                        f"input {span.name!r}: dim {axis} is {size}; expected {least} to {most}, "
                        "for which the model was built ([profile] of model.toml)"
                    )
    given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    held = " or ".join(", ".join(map(_shown, ranges)) for ranges in profiles)
    return InvalidInput(
        f"inputs are {given}; expected {held}, for which the model was built "
        "([[profile]] of model.toml)"
    )


def _shown(span: InputRange) -> str:
    """``x [1-8, 3]``"""
    dims = (
        str(most) if least == most else f"{least}-{most}"
        for least, most in zip(span.min, span.max, strict=True)
    )
    return f"{span.name} [{', '.join(dims)}]"
