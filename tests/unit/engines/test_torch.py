"""Exported programs: what is served, in batches or one by one, and what is refused with the reason.

Also that nothing in a file is executed which a plain program does not need.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.repository import spec_of

from inferq.shared.errors import ConfigError, EngineError
from inferq.shared.schema import NUMBERS
from inferq.workers.engines import pt2
from inferq.workers.engines.cores import usable_cores
from inferq.workers.models.engine import Batch, LoadedModel
from inferq.workers.models.repository import load_model
from inferq.workers.models.signatures import Examined, examine

torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install "inferq[torch]"')

from helpers import torch_models  # noqa: E402 - it needs PyTorch
from helpers.torch_models import ROWS, batch, save  # noqa: E402

from inferq.workers.engines.torch import TorchEngine  # noqa: E402


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "1" / "model.pt2"


def _read(path: Path) -> Examined:
    return examine(TorchEngine.read(path, {}))


def _loaded(
    path: Path, lanes: int = 1, most: int = 8, buckets: tuple[int, ...] = (), **table: Any
) -> LoadedModel:
    return TorchEngine(spec_of(path, table, lanes=lanes, most=most, buckets=buckets)).load()


def _ones(*shape: int) -> Any:
    return torch.ones(*shape)


# --- batchable or not ----------------------------------------------------------------------------


def _nested(path: Path) -> Path:
    pair = {"left": _ones(ROWS, 3), "right": _ones(ROWS, 3)}
    shapes = {"pair": {"left": batch(), "right": batch()}, "add": None, "scale": batch()}
    return save(path, torch_models.Nested(), (pair, True), shapes, {"scale": _ones(ROWS, 1)})


@pytest.mark.parametrize(
    ("make", "signature"),
    [
        (torch_models.double, "(x: float32[batch, 3]) -> (y: float32[batch, 3])"),
        (
            lambda path: save(
                path,
                torch_models.TwoInputs(),
                (_ones(ROWS, 2), _ones(ROWS, 2)),
                {"a": batch(), "b": batch()},
            ),
            "(a: float32[batch, 2], b: float32[batch, 2]) -> "
            "(output_0: float32[batch, 2], output_1: float32[batch, 2])",
        ),
        (
            torch_models.pooled,
            "(x: float32[batch, dim1, 4]) -> (y: float32[batch, dim1, 4], sum: float32[batch, 4])",
        ),
        (torch_models.lookup, "(ids: int64[batch]) -> (y: float32[batch, 2])"),
        (
            lambda path: save(
                path, torch.nn.Linear(3, 2).eval(), (_ones(ROWS, 3),), {"input": batch()}
            ),
            "(input: float32[batch, 3]) -> (output: float32[batch, 2])",
        ),
        (
            _nested,
            "(pair_left: float32[batch, 3], pair_right: float32[batch, 3], "
            "scale: float32[batch, 1]) -> (all_0: float32[batch, 3], all_1: float32[batch, 3], "
            "scale: float32[batch, 1])",
        ),
        (
            lambda path: save(
                path, torch_models.Double(), (_ones(ROWS, 3),), {"x": {0: torch.export.Dim.AUTO}}
            ),
            "(x: float32[batch, 3]) -> (y: float32[batch, 3])",
        ),
    ],
    ids=["named", "a tuple", "dynamic inner dim", "indices", "one tensor", "nested", "automatic"],
)
def test_a_program_whose_outputs_follow_the_rows_is_batchable(
    file: Path, make: Callable[[Path], Path], signature: str
) -> None:
    read = _read(make(file))
    assert str(read.signature) == signature
    assert read.why_not_batchable is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda path: torch_models.double(path, fixed=True),
            "dim 0 of input 'x' is fixed at 1",
        ),
        (
            lambda path: save(
                path,
                torch_models.TwoInputs(),
                (_ones(2, 2), _ones(5, 2)),
                {"a": {0: torch.export.Dim("n")}, "b": {0: torch.export.Dim("m")}},
            ),
            "dim 0 differs between the inputs (dim1, dim2)",
        ),
        (
            lambda path: save(
                path,
                torch_models.TwoInputs(),
                (_ones(2, 2), torch.tensor(1.0)),
                {"a": batch(), "b": None},
            ),
            "input 'b' is a scalar, without a batch dim",
        ),
        (
            lambda path: save(path, torch_models.Total(), (_ones(2, 3),), {"x": batch()}),
            "dim 0 of output 'output' is fixed at 1",
        ),
        (
            lambda path: save(path, torch_models.MixedRows(), (_ones(2, 3),), {"x": batch()}),
            "answers depend on the rows beside them: output 'output' of a row differs by ",
        ),
    ],
    ids=["fixed", "no common dim", "a scalar input", "one row for all", "rows that depend"],
)
def test_any_other_program_runs_request_by_request_and_says_why(
    file: Path, make: Callable[[Path], Path], reason: str
) -> None:
    why = _read(make(file)).why_not_batchable
    assert why is not None
    assert why.startswith(reason)


def test_the_repository_takes_a_program_without_a_model_toml(file: Path) -> None:
    torch_models.double(file)
    spec = load_model(file.parents[2], file.parents[1].name)
    assert (spec.config.engine, spec.path, spec.batchable) == ("torch", file, True)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: save(path, torch_models.Half(), (_ones(2, 3),), {"x": batch()}),
            "output 'output' of the model is a tensor of bfloat16; expected bool, int8",
        ),
        (
            lambda path: save(path, torch_models.WithSize(), (_ones(2, 3),), {"x": batch()}),
            "output 1 of the model is no tensor; expected tensors only",
        ),
        (
            lambda path: save(path, torch_models.Counter(), (_ones(2, 3),), {"x": batch()}),
            "the model writes to its buffer 'runs'; expected answers that leave nothing behind",
        ),
        (
            lambda path: save(path, torch.nn.BatchNorm1d(3), (_ones(2, 3),), {"input": batch()}),
            "the model writes to its buffer 'num_batches_tracked'",
        ),
        (
            lambda path: save(path, torch_models.Double(), (_ones(*[1] * 17),)),
            "input 'x' of the model has 17 dims; expected ≤ 16",
        ),
    ],
    ids=["bfloat16", "a number", "a counter", "in training", "too many dims"],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    file: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(make(file))
    assert message in str(caught.value)


@pytest.mark.parametrize("junk", [b"no model", b"", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_program_is_refused_by_its_path(file: Path, junk: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(junk)
    with pytest.raises(ConfigError) as caught:
        _read(file)
    assert str(caught.value).startswith(f"{file} ")
    assert "expected what torch.export.save writes" in str(caught.value)


def test_a_file_above_the_limit_is_refused_unread(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_models.double(file)
    size = file.stat().st_size
    monkeypatch.setattr(pt2, "MAX_PT2_BYTES", size - 1)
    with pytest.raises(ConfigError, match=f"has {size} bytes; expected at most {size - 1}"):
        _read(file)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _altered(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """`file`, its parts changed by `change` (name within the archive's folder → bytes)."""
    with zipfile.ZipFile(file) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        parts = {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}
    change(parts)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(f"{folder}/{name}", content)
    return file


def test_nothing_that_is_pickled_is_executed(file: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "executed"
    pickled = io.BytesIO()
    torch.save({"args": Bomb(bomb)}, pickled)
    table = "data/weights/model_weights_config.json"

    def example(parts: dict[str, bytes]) -> None:
        parts["data/sample_inputs/model.pt"] = pickled.getvalue()

    def weight(parts: dict[str, bytes]) -> None:
        config = json.loads(parts[table])
        config["config"]["table"]["use_pickle"] = True
        parts[table] = json.dumps(config).encode()
        parts["data/weights/weight_0"] = pickled.getvalue()

    def constant(parts: dict[str, bytes]) -> None:
        config = json.loads(parts[table])
        entry = {**config["config"]["table"], "path_name": "opaque_obj_0"}
        parts["data/constants/model_constants_config.json"] = json.dumps(
            {"config": {"c": entry}}
        ).encode()
        parts["data/constants/opaque_obj_0"] = pickle.dumps(Bomb(bomb))

    def compiled(parts: dict[str, bytes]) -> None:
        parts["data/aotinductor/model/model.so"] = b"\x7fELF"

    for change, message in (
        (example, "holds examples of inputs other than plain tensors"),
        (weight, "holds 'table' as a pickled object; expected plain tensors"),
        (constant, "holds 'c' as a pickled object; expected plain tensors"),
        (compiled, "holds compiled code"),
    ):
        with pytest.raises(ConfigError, match=message):
            _read(_altered(torch_models.lookup(file), change))
    assert not bomb.exists()


def test_the_format_of_older_versions_is_refused_with_what_to_do(file: Path) -> None:
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(ConfigError, match=r"expected it saved anew by torch\.export\.save"):
        _read(file)


def test_a_broken_graph_is_refused_with_the_versions_name(file: Path) -> None:
    def cut(parts: dict[str, bytes]) -> None:
        parts["models/model.json"] = parts["models/model.json"][:-10]

    with pytest.raises(ConfigError, match=f"cannot be loaded by PyTorch {torch.__version__[:4]}"):
        _read(_altered(torch_models.double(file), cut))


@pytest.mark.parametrize(
    ("limits", "most", "buckets", "message"),
    [
        ({"max": 4}, 8, (), "max_batch_size is 8; expected at most 4, the largest batch"),
        ({"min": 4}, 8, (), "buckets is []; expected the first to be at least 4"),
        ({"min": 4}, 8, (2, 8), "buckets is [2, 8]; expected the first to be at least 4"),
    ],
)
def test_batches_that_the_program_was_not_exported_for_are_refused(
    file: Path, limits: dict[str, int], most: int, buckets: tuple[int, ...], message: str
) -> None:
    x = _ones(4, 3)
    save(file, torch_models.Double(), (x,), {"x": batch(**limits)})
    with pytest.raises(ConfigError) as caught:
        _loaded(file, most=most, buckets=buckets)
    assert message in str(caught.value)
    _loaded(file, most=4, buckets=(4,))


# --- running -------------------------------------------------------------------------------------


def test_an_error_at_run_time_is_an_engine_error_with_the_engines_reason(file: Path) -> None:
    lane = _loaded(torch_models.lookup(file)).lanes[0]
    with pytest.raises(EngineError, match=r"torch: .*index 99 is out of bounds"):
        lane.run(Batch([{"ids": np.array([99])}], 1, 1))
    assert lane.run(Batch([{"ids": np.array([1])}], 1, 1))["y"].tolist() == [[2, 3]]


def test_missing_rows_are_seen_before_padding_is_cut(file: Path) -> None:
    save(file, torch_models.Total(), (_ones(2, 3),), {"x": batch()})
    with pytest.raises(EngineError, match="'output' has 1 rows; expected 4, as the inputs"):
        _loaded(file).lanes[0].run(Batch([{"x": np.ones((2, 3), np.float32)}], 2, 4))


def test_a_program_that_writes_to_its_input_gets_a_copy(file: Path) -> None:
    save(file, torch_models.InPlace(), (_ones(2, 3),), {"x": batch()})
    x = np.frombuffer(np.ones((2, 3), np.float32).tobytes(), np.float32).reshape(2, 3)
    outputs = _loaded(file).lanes[0].run(Batch([{"x": x}], 2, 2))
    assert outputs["y"].tolist() == [[2, 2, 1], [2, 2, 1]]
    assert x.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_nested_arguments_and_constants_are_put_in_their_places(file: Path) -> None:
    lane = _loaded(_nested(file)).lanes[0]
    parts = [
        {
            "scale": np.full((1, 1), n, np.float32),
            "pair_right": np.full((1, 3), 1, np.float32),
            "pair_left": np.full((1, 3), 2, np.float32),
        }
        for n in (1, 2)
    ]
    outputs = lane.run(Batch(parts, 2, 2))
    assert outputs["all_0"].tolist() == [[3, 3, 3], [6, 6, 6]]
    assert outputs["all_1"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert outputs["scale"].tolist() == [[1], [2]]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_dtype_that_travels_goes_in_and_comes_out(file: Path, name: str) -> None:
    dtype = getattr(torch, name)
    save(file, torch.nn.Identity(), (torch.zeros(2, 3, dtype=dtype),), {"input": batch()})
    assert str(_read(file).signature) == f"(input: {name}[batch, 3]) -> (output: {name}[batch, 3])"
    x = np.arange(6).reshape(2, 3).astype(NUMBERS[name])
    outputs = _loaded(file).lanes[0].run(Batch([{"input": x}], 2, 4))
    assert outputs["output"].dtype == NUMBERS[name]
    assert outputs["output"].tolist() == x.tolist()


def test_a_reversed_view_is_taken(file: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = _loaded(torch_models.double(file)).lanes[0].run(Batch([{"x": x[::-1]}], 2, 2))
    assert outputs["y"].tolist() == (2 * x[::-1]).tolist()


def test_a_cpu_gets_a_lane_for_each_core_it_may_use(file: Path) -> None:
    loaded = _loaded(torch_models.double(file), lanes=0, device="cpu")
    assert len(loaded.lanes) == usable_cores()
    assert loaded.parallel_lanes
    assert torch.get_num_threads() == 1


def test_an_operator_that_computes_leaves_the_gil_to_others(file: Path) -> None:
    lane = _loaded(save(file, torch_models.Square(), (_ones(2000, 2000),))).lanes[0]
    batch = Batch([{"x": np.ones((2000, 2000), np.float32)}], 1, 1, batchable=False)
    thread = threading.Thread(target=lane.run, args=(batch,))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(file: Path) -> None:
    torch_models.double(file)
    with pytest.raises(ConfigError, match=r"torch\.device is 'cuda', but no CUDA device"):
        _loaded(file, device="cuda")
    assert _loaded(file, device="auto").lanes


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"device": "tpu"}, "torch.device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"),
        ({"devices": "cpu"}, "torch.devices is not a known key; did you mean 'device'?"),
    ],
)
def test_a_bad_table_is_refused(file: Path, table: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TorchEngine.read(torch_models.double(file), table)
    assert message in str(caught.value)


def test_a_network_trained_on_digits_answers_in_batches_as_torch_does(file: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32)
    torch_models.digits(file, images[:1400], labels[:1400])
    assert str(_read(file).signature) == (
        "(image: float32[batch, 1, 8, 8]) -> (logits: float32[batch, 10], digit: int64[batch])"
    )
    lane = _loaded(file).lanes[0]
    held_out = images[1400:]
    parts = [{"image": held_out[n : n + 1 + n % 3]} for n in range(0, 100, 3)]
    for part in parts:
        rows = len(part["image"])
        alone = lane.run(Batch([part], rows, 8))
        with torch.inference_mode():
            wanted = torch.export.load(file).module()(torch.from_numpy(part["image"].copy()))
        np.testing.assert_allclose(alone["logits"], wanted["logits"].numpy(), rtol=1e-4, atol=1e-4)
    together = lane.run(Batch([{"image": held_out}], len(held_out), len(held_out)))
    assert float(np.mean(together["digit"] == labels[1400:])) > 0.9
