"""Lanes of a loaded plan, and the memory that they take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Tensors
from inferq.workers.cuda import device, memory_share
from inferq.workers.cuda.device import Device
from inferq.workers.cuda.graphs import Graphs
from inferq.workers.cuda.lane import CudaLane, block_bytes
from inferq.workers.cuda.splitting import RowLimit
from inferq.workers.models.engine import Batch, Lane
from inferq.workers.trt.executor import ProfileExecutor
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.running import Loaded, deserialize
from inferq.workers.trt.verify import Run

logger = logging.getLogger(__name__)

_MB: Final = 1e6


@dataclass(frozen=True)
class Opened:
    """A plan on the GPU."""

    lanes: Sequence[CudaLane]
    loaded: Loaded
    #: Opens one lane more, which is closed with the others. ConfigError: it does not fit.
    another: Callable[[], CudaLane]


@contextmanager
def opened(
    gpu: Device,
    flavour: Flavour,
    plan: bytes,
    *,
    count: int,
    buckets: Sequence[int],
    own_graphs: bool = False,
    cuda_graphs: bool = False,
    spin: bool = False,
    runtime_cache: bytes | None = None,
) -> Iterator[Opened]:
    """`plan`, loaded, with `count` lanes, until the end.

    `buckets`: the batch sizes that it runs at, ascending; empty: any. `own_graphs`: TensorRT
    captures CUDA graphs by itself; `cuda_graphs`: the lanes do. `spin`: see `Submission`.
    `runtime_cache`: see `deserialize`. Raises ConfigError, saying what would fit, if the GPU's
    memory does not suffice; EngineError.
    """
    lanes: list[CudaLane] = []
    with gpu:
        loaded = deserialize(flavour, plan, runtime_cache)
    held = memory_share.Held()
    held.add(len(plan))  # about its weights
    del plan  # gigabytes, maybe
    try:
        with gpu:
            another = _open_lanes(
                gpu,
                loaded,
                lanes,
                held,
                count=count,
                buckets=buckets,
                own_graphs=own_graphs,
                cuda_graphs=cuda_graphs,
                spin=spin,
            )
        yield Opened(lanes, loaded, another)
    finally:
        for lane in lanes:
            lane.close()
        with gpu:
            loaded.close()
        held.close()


def _open_lanes(
    gpu: Device,
    loaded: Loaded,
    lanes: list[CudaLane],
    held: memory_share.Held,
    *,
    count: int,
    buckets: Sequence[int],
    own_graphs: bool,
    cuda_graphs: bool,
    spin: bool,
) -> Callable[[], CudaLane]:
    """Add them to `lanes`; what they take is logged before it is taken.

    Returns what opens one more.
    """
    inputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if tensor.is_input}
    outputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if not tensor.is_input}
    profiles = [[loaded.range(name, n) for name in inputs] for n in range(loaded.profiles)]

    def executor() -> ProfileExecutor:
        made = ProfileExecutor(loaded, profiles, list(outputs), own_graphs=own_graphs)
        try:
            made.open()
        except BaseException:
            made.close()
            raise
        return made

    largest = [{span.name: span.max for span in ranges} for ranges in profiles]
    limit, graphs = RowLimit(), Graphs(cuda_graphs, within_runs=own_graphs)
    context_bytes = loaded.context_bytes  # a lane's contexts share it
    check_memory(gpu, count, context_bytes, buckets)
    # Only a context can tell how large the outputs are.
    first = executor()
    try:
        buffers = sum(block_bytes(first, inputs, outputs, largest))
        free, total = gpu.memory()
        logger.info(
            "%d lanes of %.1f MB of GPU memory each (%.1f MB for tensors, %.1f MB that TensorRT's "
            "contexts share), and %.1f MB of pinned memory; %.0f of %.0f MB of the GPU are free",
            count,
            (context_bytes + buffers) / _MB,
            buffers / _MB,
            context_bytes / _MB,
            buffers / _MB,
            (free + context_bytes) / _MB,
            total / _MB,
        )
        check_memory(gpu, count, context_bytes + buffers, buckets, taken=context_bytes)
        held.add(count * (context_bytes + buffers))
    except BaseException:
        first.close()
        raise

    def add(executor: ProfileExecutor) -> CudaLane:
        lane = CudaLane(
            gpu,
            executor,
            inputs,
            outputs,
            largest,
            limit,
            buckets=buckets,
            graphs=graphs,
            spin=spin,
        )
        lanes.append(lane)
        return lane

    def another() -> CudaLane:
        with gpu:
            check_memory(gpu, 1, context_bytes + buffers, buckets)
            lane = add(executor())
        held.add(context_bytes + buffers, lambda: lane.is_closed)
        return lane

    for number in range(count):
        add(executor() if number else first)
    return another


def check_memory(
    gpu: Device, count: int, each: int, buckets: Sequence[int], taken: int = 0
) -> None:
    """ConfigError unless `count` lanes of `each` bytes fit, `taken` of which are taken already.

    What a smaller batch would take is estimated: in proportion to its rows.
    """
    free, total = gpu.memory()
    free += taken
    free = min(free, memory_share.left(total))
    if count * each <= free:
        return
    advice = [f"lanes = {free // each}"] if each <= free else []
    fitting = [size for size in buckets if count * each * size <= free * buckets[-1]]
    if fitting:  # none: also where any size may come
        advice.append(f"max_batch_size = {fitting[-1]}")
    raise ConfigError(
        f"{count} lanes take {each / _MB:.1f} MB of GPU memory each, {free / _MB:.1f} of "
        f"{total / _MB:.1f} MB are free{memory_share.whose()}; expected in model.toml: "
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
    with device.acquired() as gpu, opened(gpu, flavour, plan, count=1, buckets=()) as made:
        yield runs_on(made.lanes[0], batchable=batchable)
