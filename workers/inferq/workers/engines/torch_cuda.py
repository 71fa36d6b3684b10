"""An exported program on a CUDA device: what its lanes run, in memory that is not PyTorch's.

PyTorch works in the primary context, as the lanes do, on a lane's own stream. Inputs and outputs
stand in the lane's buffers; what lies between is in memory of PyTorch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from inferq.shared.schema import DTYPES
from inferq.workers.cuda import device
from inferq.workers.cuda.executor import Shape
from inferq.workers.cuda.graphs import CaptureFailed, Graphs
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.cuda.splitting import RowLimit
from inferq.workers.engines.torch_program import FlatFunction, Layout, flat_function
from inferq.workers.models.engine import OutOfDeviceMemory
from inferq.workers.models.ranges import input_ranges, profile_sizes
from inferq.workers.models.spec import ModelSpec


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
    with ExitStack() as stack:
        gpu = stack.enter_context(device.acquired())
        profiles = [input_ranges(spec, each) for each in profile_sizes(spec)]
        largest = [{span.name: span.max for span in ranges} for ranges in profiles]
        signature, limit, captures = layout.signature, RowLimit(), Graphs(graphs)
        with gpu:
            function = flat_function(move_to_device_pass(program, "cuda"))

        def another() -> CudaLane:
            lane = CudaLane(
                gpu,
                _Executor(function, layout),
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


class _Executor:
    """A caller of the program, on the memory of one lane."""

    def __init__(self, function: FlatFunction, layout: Layout) -> None:
        self._function = function
        self._layout = layout
        self._addresses: dict[str, int] = {}
        self._dtypes = {
            spec.name: DTYPES[spec.dtype]
            for spec in (*layout.signature.inputs, *layout.signature.outputs)
        }
        self._outputs = [spec.name for spec in layout.signature.outputs]
        self._shapes: dict[str, Shape] = {}

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        (asked, *_) = (shape[0] for shape in shapes.values())
        least, most = self._layout.rows or (1, None)
        return max(least, asked if most is None else min(asked, most))

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """Runs once, on zeros: some sizes of outputs are only known to the program."""
        zeros = {
            name: torch.zeros(shape, dtype=_torch_dtype(self._dtypes[name].name), device="cuda")
            for name, shape in shapes.items()
        }
        answered = self._call(zeros)
        found = {
            name: tuple(tensor.shape) for name, tensor in zip(self._outputs, answered, strict=True)
        }
        torch.cuda.synchronize()
        self._shapes = {**shapes, **found}
        return found

    def set_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def enqueue(self, stream: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            self._compute()

    def capture(self, stream: int, work: Callable[[], None]) -> _Graph:
        try:
            return _Graph(torch.cuda.ExternalStream(stream), work)
        except Exception as problem:
            raise CaptureFailed(str(problem)) from problem

    def close(self) -> None:
        self._addresses.clear()

    def _compute(self) -> None:
        inputs = {
            leaf.name: self._on_device(leaf.name) for leaf in self._layout.leaves if leaf.is_tensor
        }
        for name, tensor in zip(self._outputs, self._call(inputs), strict=True):
            self._on_device(name).copy_(tensor)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        leaves = [
            inputs[leaf.name] if leaf.is_tensor else leaf.constant for leaf in self._layout.leaves
        ]
        try:
            with torch.inference_mode():
                return self._function(*leaves)
        except torch.OutOfMemoryError as problem:
            raise OutOfDeviceMemory(str(problem)) from problem

    def _on_device(self, name: str) -> torch.Tensor:
        return torch.as_tensor(
            _Memory(self._addresses[name], self._shapes[name], self._dtypes[name].str),
            device="cuda",
        )


class _Memory:
    """A lane's buffer, by the CUDA array interface (numba's, version 3)."""

    def __init__(self, address: int, shape: Shape, typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": typestr,
            "version": 3,
        }


class _Graph:
    """PyTorch's own: its allocator has to know what belongs to a graph."""

    def __init__(self, stream: Any, work: Callable[[], None]) -> None:
        self._stream = stream
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            work()

    def launch(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()

    def close(self) -> None:
        self._graph.reset()


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
