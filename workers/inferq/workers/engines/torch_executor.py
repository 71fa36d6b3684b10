"""Runs an exported program on the device memory of one lane, run by run or as a CUDA graph.

PyTorch works in the primary context, as the lanes do, on the lane's stream. Inputs and outputs
stand in the lane's memory; what lies between is in memory of PyTorch's allocator.

A graph is captured by ``capture_begin`` and ``capture_end`` themselves: the context manager
``torch.cuda.graph`` waits for the whole device and empties all caches before. The graphs of a lane
share one pool of memory, since one at a time runs and nothing of it outlives its run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch

from inferq.shared.errors import EngineError
from inferq.shared.schema import DTYPES, Array
from inferq.workers.cuda.executor import Shape
from inferq.workers.cuda.graphs import CaptureFailed
from inferq.workers.engines.torch_program import FlatFunction, Layout
from inferq.workers.models.engine import OutOfDeviceMemory, reason

#: Sets of shapes whose views are kept: as many as a lane keeps.
KEPT_SHAPES: Final = 64
#: ``cudaErrorMemoryAllocation``, and what cuBLAS and cuDNN say of the same.
_OUT_OF_MEMORY: Final = 2
_ALLOCATION_FAILED: Final = "_STATUS_ALLOC_FAILED"


class TorchExecutor:
    """A caller of the program, on the memory of one lane: see `cuda.executor.Executor`."""

    def __init__(self, function: FlatFunction, layout: Layout, device: str = "cuda") -> None:
        self._function: FlatFunction | None = function
        self._layout = layout
        self._device = device
        self._dtypes = {
            spec.name: spec.dtype for spec in (*layout.signature.inputs, *layout.signature.outputs)
        }
        self._inputs = [spec.name for spec in layout.signature.inputs]
        self._outputs = [spec.name for spec in layout.signature.outputs]
        self._views: OrderedDict[tuple[Shape, ...], _Views] = OrderedDict()
        self._current = _Views({}, {})
        self._streams: dict[int, Any] = {}
        #: Of the lane's graphs. Without any of them PyTorch may have given it up.
        self._pool: Any = None
        self._graphs = 0

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        (asked, *_) = (shape[0] for shape in shapes.values())
        least, most = self._layout.rows or (1, None)
        return max(least, asked if most is None else min(asked, most))

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        key = tuple(shapes[name] for name in self._inputs)
        views = self._views.get(key)
        if views is None:
            outputs = self._layout.output_shapes(shapes) or self._run_on_zeros(shapes)
            views = self._views[key] = _Views(shapes, outputs)
            if len(self._views) > KEPT_SHAPES:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        self._current = views
        return views.outputs

    def set_address(self, name: str, address: int) -> None:
        views = self._current
        if views.addresses.get(name) == address:
            return
        shape = views.inputs[name] if name in views.inputs else views.outputs[name]
        views.tensors[name] = tensor_at(address, shape, self._dtypes[name])
        views.addresses[name] = address

    def enqueue(self, stream: int) -> None:
        with torch.cuda.stream(self._stream(stream)):
            self.compute()

    def capture(self, stream: int, work: Callable[[], None]) -> TorchGraph:
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = TorchGraph(self._stream(stream), self._closed_graph)
        self._graphs += 1
        try:
            graph.capture(self._pool, work)
        except Exception as problem:
            with suppress(Exception):
                graph.close()
            raise CaptureFailed(f"torch: {reason(problem)}") from problem
        return graph

    def close(self) -> None:
        self._function = None
        self._views.clear()
        self._current = _Views({}, {})
        self._streams.clear()

    def compute(self) -> None:
        """A run on PyTorch's current stream. EngineError: an output is not as it was told."""
        views = self._current
        with torch.inference_mode():
            answered = self._call(views.tensors)
            for name, tensor in zip(self._outputs, answered, strict=True):
                into = views.tensors[name]
                # A copy would widen one row to many, or turn numbers into others, without a word.
                if tensor.shape != into.shape or tensor.dtype != into.dtype:
                    raise EngineError(
                        f"torch: output {name!r} is {_shown(tensor)}; expected {_shown(into)}, "
                        "as for the shapes of the inputs before"
                    )
                into.copy_(tensor, non_blocking=True)

    def _run_on_zeros(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The outputs' shapes where nothing but a run tells them."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.inference_mode():
            zeros = {
                name: torch.zeros(shape, dtype=_dtype(self._dtypes[name]), device=self._device)
                for name, shape in shapes.items()
            }
            answered = self._call(zeros)
            found = [tuple(tensor.shape) for tensor in answered]
            stream.synchronize()
        return dict(zip(self._outputs, found, strict=True))

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        assert self._function is not None, "it is closed"
        leaves = [
            inputs[leaf.name] if leaf.is_tensor else leaf.constant for leaf in self._layout.leaves
        ]
        with out_of_memory():
            return self._function(*leaves)

    def _stream(self, handle: int) -> Any:
        if handle not in self._streams:
            self._streams[handle] = torch.cuda.ExternalStream(handle)
        return self._streams[handle]

    def _closed_graph(self) -> None:
        self._graphs -= 1


class TorchGraph:
    """PyTorch's own: its allocator has to know what belongs to a graph."""

    def __init__(self, stream: Any, closed: Callable[[], None]) -> None:
        self._stream = stream
        self._closed = closed
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, pool: Any, work: Callable[[], None]) -> None:
        """Whatever goes wrong is raised, and the stream captures no longer."""
        with torch.cuda.stream(self._stream):
            # Only this thread's calls can spoil it.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(Exception):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def launch(self) -> None:
        with torch.cuda.stream(self._stream), out_of_memory():
            self._graph.replay()

    def close(self) -> None:
        self._closed()
        self._graph.reset()


class _Views:
    """One set of shapes, and the tensors that stand for the lane's memory."""

    def __init__(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        self.addresses: dict[str, int] = {}
        self.tensors: dict[str, torch.Tensor] = {}


class _Memory:
    """A lane's buffer, by the CUDA array interface (numba's, version 3)."""

    def __init__(self, address: int, shape: Shape, typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": typestr,
            "version": 3,
        }


def tensor_at(address: int, shape: Shape, dtype: str) -> torch.Tensor:
    """The device memory at `address`, which stays its owner's."""
    return torch.as_tensor(_Memory(address, shape, DTYPES[dtype].str), device="cuda")


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turns PyTorch's errors of memory that does not suffice into OutOfDeviceMemory."""
    try:
        yield
    except RuntimeError as problem:
        if (
            isinstance(problem, torch.OutOfMemoryError)
            or getattr(problem, "error_code", None) == _OUT_OF_MEMORY
            or _ALLOCATION_FAILED in str(problem)
        ):
            raise OutOfDeviceMemory(str(problem)) from problem
        raise


def _shown(tensor: Array) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
