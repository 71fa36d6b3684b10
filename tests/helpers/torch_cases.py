"""Cases of the torch engine's CUDA lanes, each run as ``python -m helpers.torch_cases NAME``.

Lanes, executor, program and PyCUDA are real. The driver is a fake (see fakecuda), and so is what
the executor calls of ``torch.cuda``: operators are put on the fake driver's streams, or into its
graphs, as kernels that compute on the CPU. No GPU.
Each function without parameters is a case.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu.together import together
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import torch_models
from helpers.fake_torch_cuda import DEVICE_WIDE, FakeCuda
from helpers.fakecuda.control import Control
from inferq.shared.errors import ConfigError, EngineError
from inferq.shared.schema import Array
from inferq.workers.cuda import calls
from inferq.workers.engines import torch_cuda
from inferq.workers.engines.torch import TorchEngine
from inferq.workers.engines.torch_program import flat_function
from inferq.workers.models.engine import Batch, LoadedModel
from inferq.workers.models.repository import load_model

CONTROL = Control()
PATCH = pytest.MonkeyPatch()


class _OnStream(TorchDispatchMode):  # type: ignore[misc]
    """Runs each operator for its outputs, and puts it on a stream, to be run in its turn again."""

    def __init__(self, stream: int) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))

        def kernel() -> int:
            with torch.inference_mode():
                again = func(*args, **(kwargs or {}))
                for old, new in zip(
                    pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True
                ):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return 0

        assert CONTROL.launch(self._stream, kernel) == 0
        return out


class StreamedCuda(FakeCuda):
    """The fake, on the fake driver's streams and graphs."""

    @contextmanager
    def operators(self, stream: int) -> Iterator[None]:
        with _OnStream(stream):
            yield

    def begun(self, graph: Any) -> None:
        calls.begin_capture(self.current[-1])

    def ended(self, graph: Any) -> None:
        captured = calls.end_capture(self.current[-1])
        graph.executable = calls.instantiate(captured)
        calls.destroy_graph(captured)

    def replayed(self, graph: Any) -> None:
        calls.launch(graph.executable, self.current[-1])

    def dropped(self, graph: Any) -> None:
        calls.destroy_executable(graph.executable)


def _cuda() -> StreamedCuda:
    PATCH.setattr(torch.cuda, "is_available", lambda: True)
    PATCH.setattr(torch_cuda, "move_to_device_pass", lambda program, _: program)
    return StreamedCuda(PATCH)


def _load(path: Path, *, lanes: int = 2, graphs: bool = True) -> LoadedModel:
    folder = path.parents[1]
    (folder / "model.toml").write_text(
        f"max_batch_size = 8\nbuckets = [1, 4, 8]\nlanes = {lanes}\n"
        f'[torch]\ndevice = "cuda"\ncuda_graphs = {str(graphs).lower()}\n'
    )
    return TorchEngine(load_model(folder.parent, folder.name)).load()


class Scores(torch.nn.Module):  # type: ignore[misc]
    """x: [batch, 6] → scores of each row, and the best one's number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
        )

    def forward(self, x: Any) -> Any:
        scores = self.layers(x)
        return {"scores": scores, "best": scores.argmax(1)}


def _saved() -> Path:
    folder = Path(tempfile.mkdtemp())
    model = Scores().eval()
    return torch_models.save(
        folder / "scores" / "1" / "model.pt2",
        model,
        (torch.zeros(2, 6),),
        {"x": torch_models.batch()},
    )


def _batch(rows: int, bucket: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    parts = [{"x": rng.standard_normal((1, 6)).astype(np.float32)} for _ in range(rows)]
    return Batch(parts, rows, bucket)


def _check(lane: Any, batch: Batch, model: Any) -> None:
    x: Array = np.concatenate([part["x"] for part in batch.parts])
    with torch.inference_mode():
        wanted = model(torch.from_numpy(x))
    given = lane.run(batch)
    np.testing.assert_allclose(given["scores"], wanted["scores"].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(given["best"], wanted["best"].numpy())


def every_request_gets_its_rows() -> None:
    """Sizes in turn and back, padding, two lanes at once; as graphs and without."""
    model = Scores().eval()
    for graphs in (True, False):
        cuda = _cuda()
        loaded = _load(_saved(), graphs=graphs)

        def drive(_: object, lane: Any) -> None:
            for turn, (rows, bucket) in itertools.product(range(5), ((4, 4), (7, 8), (1, 1))):
                _check(lane, _batch(rows, bucket, 10 * turn + rows), model)

        together([partial(drive, lane=lane) for lane in loaded.lanes], 30)
        begun = [call.split()[2] for call in cuda.calls if call.startswith("capture_begin")]
        assert bool(begun) == graphs
        assert len(set(begun)) == (2 if graphs else 0), "a pool for each lane"
        assert not [call for call in cuda.calls if call.split()[0] in DEVICE_WIDE]
        assert cuda.views == 2 * 3 * 3, "of each lane, set of shapes and tensor one"
        loaded.close()
        assert CONTROL.count("graph_execs") == 0


def memory_is_given_back_when_the_weights_are_gone() -> None:
    cuda = _cuda()
    kept: list[Any] = []
    original = flat_function

    def watched(program: Any) -> Any:
        kept.extend(weakref.ref(weight) for weight in program.state_dict.values())
        return original(program)

    PATCH.setattr(torch_cuda, "flat_function", watched)
    alive: list[int] = []

    def empty_cache() -> None:
        cuda.note("empty_cache")
        alive.append(sum(ref() is not None for ref in kept))

    PATCH.setattr(torch.cuda, "empty_cache", empty_cache)
    loaded = _load(_saved())
    _check(loaded.lanes[0], _batch(4, 4, 0), Scores().eval())
    assert len(kept) == 4
    assert all(ref() is not None for ref in kept)
    CONTROL._kernels.clear()  # nothing runs any more, and they hold what they computed with
    loaded.close()
    assert alive == [0]
    assert cuda.calls[-1] == "empty_cache"


def a_capture_that_fails_turns_graphs_off_and_the_lane_goes_on() -> None:
    cuda = _cuda()
    loaded = _load(_saved())
    cuda.raises["capture_end"] = RuntimeError("operation would make the legacy stream depend")
    original = StreamedCuda.ended
    # The driver's capture is ended all the same, as PyTorch does it.
    PATCH.setattr(StreamedCuda, "dropped", lambda *_: None)
    noted = cuda.note

    def note(call: str) -> None:
        if call == "capture_end":
            calls.destroy_graph(calls.end_capture(cuda.current[-1]))
        noted(call)

    PATCH.setattr(cuda, "note", note)
    for turn in range(4):
        _check(loaded.lanes[0], _batch(4, 4, turn), Scores().eval())
    assert sum(call.startswith("capture_begin") for call in cuda.calls) == 1
    PATCH.setattr(StreamedCuda, "ended", original)
    loaded.close()


def an_output_that_is_not_as_told_reaches_nobody() -> None:
    _cuda()
    original = flat_function
    PATCH.setattr(
        torch_cuda,
        "flat_function",
        lambda program: lambda *leaves: [out[:1] for out in original(program)(*leaves)],
    )
    loaded = _load(_saved())
    with pytest.raises(
        EngineError, match=r"output 'scores' is float32\[1, 5\]; expected .*\[4, 5\]"
    ):
        loaded.lanes[0].run(_batch(4, 4, 0))
    loaded.close()


def a_name_of_both_an_input_and_an_output_is_refused() -> None:
    _cuda()

    class Same(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return {"x": x + 1}

    path = Path(tempfile.mkdtemp()) / "same" / "1" / "model.pt2"
    torch_models.save(path, Same(), (torch.zeros(2, 6),), {"x": torch_models.batch()})
    with pytest.raises(ConfigError, match="an input and an output of the model are called 'x'"):
        _load(path)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
