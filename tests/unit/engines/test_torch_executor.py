"""A program on a lane's memory: the executor's own code, on CPU tensors and a fake of torch.cuda.

No GPU. What PyTorch does with a stream or a graph is not shown, only what it is asked to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array
from inferq.workers.cuda.graphs import CaptureFailed
from inferq.workers.models.engine import OutOfDeviceMemory

torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install "inferq[torch]"')

from helpers import torch_models  # noqa: E402 - it needs PyTorch
from helpers.fake_torch_cuda import DEVICE_WIDE, FakeCuda  # noqa: E402
from helpers.torch_models import batch, save  # noqa: E402

from inferq.workers.engines.torch_executor import KEPT_SHAPES, TorchExecutor  # noqa: E402
from inferq.workers.engines.torch_program import Layout, flat_function, read_layout  # noqa: E402

STREAM = 77
Shapes = Mapping[str, tuple[int, ...]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


class Program:
    """An exported program, and how often it ran."""

    def __init__(self, path: Path) -> None:
        exported = torch.export.load(path)
        self.layout: Layout = read_layout(exported)
        self._function = flat_function(exported)
        self.runs = 0

    def __call__(self, *leaves: Any) -> Any:
        self.runs += 1
        return self._function(*leaves)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(torch_models.double(tmp_path / "1" / "model.pt2"))


def _executor(function: Callable[..., Any], layout: Layout) -> TorchExecutor:
    return TorchExecutor(function, layout, device="cpu")


def _place(cuda: FakeCuda, executor: TorchExecutor, layout: Layout, shapes: Shapes) -> Tensors:
    """Set `shapes`, and all addresses; returns the memory there."""
    found = {**shapes, **executor.set_shapes(shapes)}
    memory = {}
    for spec in (*layout.signature.inputs, *layout.signature.outputs):
        memory[spec.name] = cuda.memory(found[spec.name], spec.dtype)
        executor.set_address(spec.name, memory[spec.name].ctypes.data)
    return memory


Tensors = dict[str, Array]


# --- shapes and views ----------------------------------------------------------------------------


class Shaped(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Outputs whose sizes are computed of the inputs': joined, flattened, padded, halved."""

    def forward(self, x: Any) -> Any:
        return {
            "joined": torch.cat([x, x], 1),
            "flat": x.reshape(-1, 4),
            "padded": torch.nn.functional.pad(x, (0, 0, 0, 3)),
            "halved": torch.nn.functional.avg_pool1d(x.transpose(1, 2), 2),
        }


def test_the_outputs_shapes_are_told_without_a_run(cuda: FakeCuda, tmp_path: Path) -> None:
    seq = torch.export.Dim("seq", min=4)
    shapes = {"x": {**batch(), 1: seq}}
    program = Program(save(tmp_path / "model.pt2", Shaped(), (torch.ones(2, 6, 4),), shapes))
    executor = _executor(program, program.layout)
    for rows, length in ((1, 4), (5, 7), (3, 9)):
        told = executor.set_shapes({"x": (rows, length, 4)})
        wanted = Shaped()(torch.ones(rows, length, 4))
        assert told == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    assert program.runs == 0
    assert cuda.calls == []


class NonZero(torch.nn.Module):  # type: ignore[misc, name-defined]
    """As many rows as values that are not zero."""

    def forward(self, x: Any) -> Any:
        return {"at": (x + 1).nonzero()}


def test_sizes_that_only_a_run_tells_are_run_for_once_on_a_stream_of_their_own(
    cuda: FakeCuda, tmp_path: Path
) -> None:
    path = save(tmp_path / "model.pt2", NonZero(), (torch.ones(2, 3),), {"x": batch()})
    program = Program(path)
    executor = _executor(program, program.layout)
    for _ in range(2):
        assert executor.set_shapes({"x": (4, 3)}) == {"at": (12, 2)}
    assert program.runs == 1
    assert cuda.calls == ["synchronize stream 1 on 1"]


def test_views_are_made_once_for_each_set_of_shapes(cuda: FakeCuda, program: Program) -> None:
    executor = _executor(program, program.layout)
    places = {rows: _place(cuda, executor, program.layout, {"x": (rows, 3)}) for rows in (2, 4)}
    assert cuda.views == 4
    for turn in range(3):
        for rows, memory in places.items():
            executor.set_shapes({"x": (rows, 3)})
            for name, array in memory.items():
                executor.set_address(name, array.ctypes.data)
            memory["x"][...] = turn + rows
            executor.enqueue(STREAM)
            np.testing.assert_array_equal(memory["y"], 2 * memory["x"])
    assert cuda.views == 4
    assert program.runs == 6


def test_an_address_that_changes_is_followed(cuda: FakeCuda, program: Program) -> None:
    executor = _executor(program, program.layout)
    before = _place(cuda, executor, program.layout, {"x": (2, 3)})
    after = _place(cuda, executor, program.layout, {"x": (2, 3)})
    after["x"][...] = 7
    executor.enqueue(STREAM)
    assert after["y"].tolist() == [[14] * 3] * 2
    assert not before["y"].any()


def test_any_number_of_shapes_keeps_few_views(cuda: FakeCuda, program: Program) -> None:
    executor = _executor(program, program.layout)
    for rows in range(1, 2 * KEPT_SHAPES):
        _place(cuda, executor, program.layout, {"x": (rows, 3)})
    made = cuda.views
    _place(cuda, executor, program.layout, {"x": (1, 3)})
    assert cuda.views == made + 2, "the oldest were let go"
    assert len(executor._views) == KEPT_SHAPES


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda x: torch.full((1, 3), 5.0),
            r"output 'y' is float32\[1, 3\]; expected float32\[4, 3\]",
        ),
        (lambda x: torch.tensor(5.0), r"output 'y' is float32\[\]; expected float32\[4, 3\]"),
        (
            lambda x: (x + x).double(),
            r"output 'y' is float64\[4, 3\]; expected float32\[4, 3\]",
        ),
    ],
    ids=["one row for all", "one number for all", "another dtype"],
)
def test_an_output_that_is_not_as_told_is_an_error_and_nothing_is_written(
    cuda: FakeCuda, program: Program, answer: Callable[[Any], Any], message: str
) -> None:
    executor = _executor(lambda x: (answer(x),), program.layout)
    memory = _place(cuda, executor, program.layout, {"x": (4, 3)})
    memory["x"][...] = 1
    with pytest.raises(EngineError, match=message):
        executor.enqueue(STREAM)
    assert not memory["y"].any()


def test_a_real_program_whose_rows_depend_on_values_is_an_error_where_they_differ(
    cuda: FakeCuda, tmp_path: Path
) -> None:
    path = save(tmp_path / "model.pt2", NonZero(), (torch.ones(2, 3),), {"x": batch()})
    program = Program(path)
    executor = _executor(program, program.layout)
    memory = _place(cuda, executor, program.layout, {"x": (2, 3)})
    executor.enqueue(STREAM)
    assert memory["at"].tolist() == [[row, column] for row in range(2) for column in range(3)]
    memory["x"].ravel()[:5] = -1  # which leaves one row, that would fit all of them
    with pytest.raises(EngineError, match=r"output 'at' is int64\[1, 2\]; expected int64\[6, 2\]"):
        executor.enqueue(STREAM)


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["the allocator", "cuBLAS"],
)
def test_memory_that_is_short_is_told_apart(
    cuda: FakeCuda, program: Program, problem: Exception
) -> None:
    def fails(x: Any) -> Any:
        raise problem

    executor = _executor(fails, program.layout)
    _place(cuda, executor, program.layout, {"x": (4, 3)})
    with pytest.raises(OutOfDeviceMemory, match=str(problem)[:10]):
        executor.enqueue(STREAM)
    graph = _executor(program, program.layout).capture(STREAM, lambda: None)
    cuda.raises["replay"] = problem
    with pytest.raises(OutOfDeviceMemory):
        graph.launch()
    cuda.raises["replay"] = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        graph.launch()


# --- graphs --------------------------------------------------------------------------------------


def test_a_capture_is_of_its_thread_and_stream_alone(cuda: FakeCuda, program: Program) -> None:
    executor = _executor(program, program.layout)
    memory = _place(cuda, executor, program.layout, {"x": (4, 3)})
    memory["x"][...] = 2

    def work() -> None:
        cuda.note("copies in")
        executor.enqueue(STREAM)
        cuda.note("copies out")

    graph = executor.capture(STREAM, work)
    graph.launch()
    graph.close()
    assert cuda.calls == [
        f"capture_begin pool 1 thread_local on {STREAM}",
        f"copies in on {STREAM}",
        f"copies out on {STREAM}",
        f"capture_end on {STREAM}",
        f"replay on {STREAM}",
        "reset",
    ]
    assert memory["y"].tolist() == [[4] * 3] * 4


def test_nothing_that_a_lane_does_waits_for_the_whole_device(
    cuda: FakeCuda, program: Program, tmp_path: Path
) -> None:
    other = Program(save(tmp_path / "m.pt2", NonZero(), (torch.ones(2, 3),), {"x": batch()}))
    for each in (program, other):
        executor = _executor(each, each.layout)
        for rows in (2, 4, 2):
            _place(cuda, executor, each.layout, {"x": (rows, 3)})
            executor.enqueue(STREAM)
            executor.enqueue(STREAM)
            graph = executor.capture(STREAM, partial(executor.enqueue, STREAM))
            graph.launch()
            graph.close()
        executor.close()
    assert not [call for call in cuda.calls if call.split()[0] in DEVICE_WIDE and call != _OWN]


_OWN = "synchronize stream 1 on 1"


def test_a_lanes_graphs_share_one_pool_and_no_other_lanes(cuda: FakeCuda, program: Program) -> None:
    lanes = [_executor(program, program.layout) for _ in range(2)]
    for _ in range(3):
        for executor in lanes:
            executor.capture(STREAM, lambda: None)
    begun = [call.split()[2] for call in cuda.calls if call.startswith("capture_begin")]
    assert begun == ["1", "2"] * 3


def test_a_pool_that_no_graph_holds_any_more_is_not_used_again(
    cuda: FakeCuda, program: Program
) -> None:
    """PyTorch refuses one whose last graph was reset."""
    executor = _executor(program, program.layout)
    first, second = (executor.capture(STREAM, lambda: None) for _ in range(2))
    first.close()
    third = executor.capture(STREAM, lambda: None)
    second.close()
    third.close()
    executor.capture(STREAM, lambda: None)
    begun = [call.split()[2] for call in cuda.calls if call.startswith("capture_begin")]
    assert begun == ["1", "1", "1", "2"]


@pytest.mark.parametrize("failing", ["capture_begin", "work", "capture_end"])
def test_a_capture_that_fails_is_ended_and_says_why(
    cuda: FakeCuda, program: Program, failing: str
) -> None:
    executor = _executor(program, program.layout)
    cuda.raises[failing] = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(CaptureFailed, match=r"torch: operation not permitted when stream is"):
        executor.capture(STREAM, lambda: cuda.note("work"))
    called = [call.split()[0] for call in cuda.calls]
    ended = [] if failing == "capture_begin" else ["capture_end"]
    work = [] if failing == "capture_begin" else ["work"]
    assert called == ["capture_begin", *work, *ended, "reset"]
    assert cuda.current == []
    cuda.raises.clear()
    executor.capture(STREAM, lambda: None)
    assert cuda.calls[-2].startswith("capture_begin pool 2 ")


def test_a_closed_executor_holds_neither_the_program_nor_the_memory(
    cuda: FakeCuda, program: Program
) -> None:
    executor = _executor(program, program.layout)
    _place(cuda, executor, program.layout, {"x": (4, 3)})
    executor.close()
    held = [value for value in vars(executor).values() if value is program]
    assert not held
    assert not executor._views
    assert not executor._current.tensors
