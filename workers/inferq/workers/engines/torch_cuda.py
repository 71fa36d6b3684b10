"""An exported program on a CUDA device, with its lanes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.export.passes import move_to_device_pass

from inferq.workers.cuda import device
from inferq.workers.cuda.captures import CAPTURES
from inferq.workers.cuda.graphs import Graphs
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.cuda.splitting import RowLimit
from inferq.workers.engines.on_gpu import check_names
from inferq.workers.engines.torch_executor import TorchExecutor, out_of_memory
from inferq.workers.engines.torch_program import FlatFunction, Layout, flat_function
from inferq.workers.models.ranges import input_ranges, profile_sizes
from inferq.workers.models.spec import ModelSpec

logger = logging.getLogger(__name__)


@contextmanager
def opened(
    program: torch.export.ExportedProgram,
    layout: Layout,
    spec: ModelSpec,
    *,
    count: int,
    buckets: tuple[int, ...],
    graphs: bool,
) -> Iterator[tuple[Sequence[CudaLane], Callable[[], CudaLane]]]:
    """`program`, on the device, with `count` lanes, until the end, and what opens one lane more.

    ConfigError, EngineError, FatalEngineError or what PyTorch raises.
    """
    check_names(layout.signature, 'torch.device = "cuda"')
    with ExitStack() as stack:
        gpu = stack.enter_context(device.acquired())
        profiles = [input_ranges(spec, each) for each in profile_sizes(spec)]
        largest = [{span.name: span.max for span in ranges} for ranges in profiles]
        signature, limit, captures = layout.signature, RowLimit(), Graphs(graphs)
        held: list[FlatFunction] = []
        stack.callback(_empty_cache, gpu)
        stack.callback(held.clear)
        with gpu, out_of_memory():
            held.append(flat_function(move_to_device_pass(program, "cuda")))
        del program  # its weights are held by lanes until they are closed, and by nothing else

        def another() -> CudaLane:
            lane = CudaLane(
                gpu,
                TorchExecutor(held[0], layout),
                {tensor.name: tensor.dtype for tensor in signature.inputs},
                {tensor.name: tensor.dtype for tensor in signature.outputs},
                largest,
                limit,
                buckets=buckets,
                graphs=captures,
                spin=spec.config.gpu_wait == "spin",
            )
            stack.callback(lane.close)
            return lane

        yield [another() for _ in range(count)], another


def _empty_cache(gpu: device.Device) -> None:
    """Give PyTorch's free memory back to the device, and the weights, which a cycle has kept."""
    try:
        # PyTorch refuses while a graph is captured, and the device is waited for.
        with CAPTURES.shared(), gpu.entered():
            gc.collect()
            torch.cuda.empty_cache()
    except Exception as problem:  # noqa: BLE001 - the process is about to end then
        logger.warning("PyTorch's memory was not given back: %s", problem)
