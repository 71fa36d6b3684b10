"""ONNX files: what is served, in batches or one by one, and what is refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import onnx_models, real_models, row_models
from helpers.onnx_models import FLOAT, node
from helpers.repository import spec_of

from inferq.shared.errors import ConfigError, EngineError
from inferq.workers.engines import cores, onnxruntime
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.engine import Batch, LoadedModel
from inferq.workers.models.signatures import Examined, examine


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "1" / "model.onnx"


def _read(path: Path, batchable: bool | None = None) -> Examined:
    return examine(OnnxRuntimeEngine.read(path, {}), batchable)


def _loaded(path: Path, lanes: int = 1, **table: Any) -> LoadedModel:
    return OnnxRuntimeEngine(spec_of(path, table, lanes=lanes)).load()


# --- batchable or not ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "signature"),
    [
        (onnx_models.double, "(x: float32[batch, 3]) -> (y: float32[batch, 3])"),
        (
            onnx_models.two_inputs,
            "(a: float32[batch, 2], b: float32[batch, 2]) -> "
            "(c: float32[batch, 2], d: float32[batch, 2])",
        ),
        (
            onnx_models.pooled,
            "(x: float32[batch, seq, 4]) -> (y: float32[batch, seq, 4], sum: float32[batch, 4])",
        ),
        (
            lambda path: onnx_models.double(path, ("N", 3), ("Addy_dim_0", 3)),
            "(x: float32[N, 3]) -> (y: float32[N, 3])",
        ),
        (
            lambda path: onnx_models.double(path, (None, 3), (None, 3)),
            "(x: float32[batch, 3]) -> (y: float32[batch, 3])",
        ),
        (
            lambda path: onnx_models.double(path, ("unk__214", 3), ("unk__215", 3)),
            "(x: float32[batch, 3]) -> (y: float32[batch, 3])",
        ),
        (
            lambda path: onnx_models.two_inputs(path, ("unk__1", 2), ("unk__2", 2)),
            "(a: float32[batch, 2], b: float32[batch, 2]) -> "
            "(c: float32[batch, 2], d: float32[batch, 2])",
        ),
        (
            lambda path: onnx_models.double(path, ("N", 3), None),
            "(x: float32[N, 3]) -> (y: float32[N, 3])",
        ),
        (onnx_models.lookup, "(ids: int64[batch]) -> (y: float32[batch, 2])"),
    ],
    ids=[
        "named",
        "two inputs",
        "dynamic inner dim",
        "output named otherwise",
        "unnamed",
        "invented names",
        "two inputs with invented names",
        "output without rank",
        "indices",
    ],
)
def test_a_model_whose_outputs_follow_the_rows_is_batchable(
    file: Path, make: Callable[[Path], Path], signature: str
) -> None:
    read = _read(make(file))
    assert str(read.signature) == signature
    assert read.signature.batch_symbol is not None
    assert read.why_not_batchable is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: onnx_models.double(path, (1, 3)), "dim 0 of input 'x' is fixed at 1"),
        (
            lambda path: onnx_models.two_inputs(path, ("n", 2), ("m", 2)),
            "dim 0 differs between the inputs (m, n)",
        ),
        (
            lambda path: onnx_models.two_inputs(path, ("n", 2), ()),
            "input 'b' is a scalar, without a batch dim",
        ),
        (
            lambda path: onnx_models.double(path, ("n", "n")),
            "dim 0 of the inputs (n) is another dim's size, too",
        ),
        (onnx_models.total, "dim 0 of output 'y' is fixed at 1"),
        (
            onnx_models.first_row,
            "the rows of output 'y' do not follow those of the inputs: [1, 3] of 3 rows",
        ),
        (
            onnx_models.mixed_rows,
            "answers depend on the rows beside them: output 'y' of a row differs by ",
        ),
    ],
    ids=[
        "fixed at 1",
        "no common dim",
        "a scalar input",
        "square",
        "one row for all",
        "fewer rows than promised",
        "rows that depend on each other",
    ],
)
def test_any_other_model_runs_request_by_request_and_says_why(
    file: Path, make: Callable[[Path], Path], reason: str
) -> None:
    why = _read(make(file)).why_not_batchable
    assert why is not None
    assert why.startswith(reason)


def _square(path: Path) -> Path:
    """41 × 41 reshaped: none of the sizes tried for the open dims fits."""
    shape = onnx_models.ints("shape", [2], [-1, 1681])
    nodes = [node("Reshape", ["x", "shape"], ["y"])]
    inputs: onnx_models.Tensors = {"x": (FLOAT, ("batch", "h", 41))}
    return onnx_models.write(path, nodes, inputs, {"y": (FLOAT, ("batch", 1681))}, [shape])


def test_a_model_that_no_example_fits_runs_request_by_request_and_says_what_to_write(
    file: Path,
) -> None:
    why = _read(_square(file)).why_not_batchable
    assert why is not None
    assert why.startswith("no example could be run to see whether its rows are independent (")
    assert "batchable = true" in why
    assert _read(_square(file), batchable=True).why_not_batchable is None
    known = examine(OnnxRuntimeEngine.read(file, {}), None, {"h": 41})
    assert known.why_not_batchable is None


def test_a_model_that_is_not_batchable_is_run_as_it_is(file: Path) -> None:
    loaded = _loaded(onnx_models.two_inputs(file, ("n", 2), ("m", 2)))
    a, b = np.ones((2, 2), np.float32), np.ones((5, 2), np.float32)
    outputs = loaded.lanes[0].run(Batch([{"a": a, "b": b}], 1, 1, batchable=False))
    assert (outputs["c"].shape, outputs["d"].shape) == ((2, 2), (5, 2))


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (onnx_models.split, "output 'y' of the model is a seq(tensor(float)); expected a tensor"),
        (
            lambda path: onnx_models.double(path, None),
            "input 'x' of the model has no shape; expected a rank",
        ),
        (
            lambda path: onnx_models.write(
                path,
                [node("Cast", "x", "y", to=onnx_models.BFLOAT16)],
                {"x": (FLOAT, ("batch",))},
                {"y": (onnx_models.BFLOAT16, ("batch",))},
            ),
            "output 'y' of the model is a tensor(bfloat16); expected a tensor of bool, int8",
        ),
        (
            lambda path: onnx_models.double(path, ("batch", *[1] * 16)),
            "input 'x' of the model has 17 dims; expected ≤ 16",
        ),
    ],
    ids=["a sequence", "no rank", "bfloat16", "too many dims"],
)
def test_what_cannot_travel_is_refused_with_the_reason(
    file: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(make(file))
    assert message in str(caught.value)


def test_a_file_that_is_no_model_is_refused_by_its_path(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no model")
    with pytest.raises(ConfigError) as caught:
        _read(file)
    assert str(caught.value).startswith(f"{file} cannot be loaded by ONNX Runtime: ")


def test_a_model_above_protobufs_limit_is_refused_unread(file: Path) -> None:
    file.parent.mkdir()
    with file.open("wb") as sparse:
        sparse.truncate(onnxruntime.MAX_ONNX_BYTES + 1)
    with pytest.raises(ConfigError, match="external data files beside it"):
        _read(file)


def test_weights_in_a_file_beside_the_model_are_loaded(file: Path) -> None:
    onnx_models.external(file, "weights.bin")
    np.arange(4, dtype=np.float32).tofile(file.parent / "weights.bin")
    outputs = _loaded(file).lanes[0].run(Batch([{"x": np.zeros((1, 4), np.float32)}], 1, 1))
    assert outputs["y"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("location", ["../weights.bin", "{outside}", "link.bin"])
def test_weights_outside_the_models_folder_are_refused(file: Path, location: str) -> None:
    outside = file.parent.parent / "weights.bin"
    onnx_models.external(file, location.format(outside=outside))
    np.arange(4, dtype=np.float32).tofile(outside)
    (file.parent / "link.bin").symlink_to(outside)
    with pytest.raises(ConfigError, match="External data path"):
        _read(file)


# --- running -------------------------------------------------------------------------------------


def test_an_error_at_run_time_is_an_engine_error_with_the_engines_reason(file: Path) -> None:
    lane = _loaded(onnx_models.lookup(file)).lanes[0]
    with pytest.raises(EngineError, match=r"onnxruntime: .*indices element out of data bounds"):
        lane.run(Batch([{"ids": np.array([99])}], 1, 1))
    assert lane.run(Batch([{"ids": np.array([1])}], 1, 1))["y"].tolist() == [[2, 3]]


def test_missing_rows_are_seen_before_padding_is_cut(file: Path) -> None:
    lane = _loaded(onnx_models.first_row(file)).lanes[0]
    with pytest.raises(EngineError, match="output 'y' has 1 rows; expected 4, as the inputs"):
        lane.run(Batch([{"x": np.ones((2, 3), np.float32)}], 2, 4))


def test_a_cpu_gets_a_lane_for_each_core_it_may_use(file: Path) -> None:
    loaded = _loaded(onnx_models.double(file), lanes=0, provider="cpu")
    assert len(loaded.lanes) == usable_cores() <= len(os.sched_getaffinity(0))
    assert loaded.parallel_lanes


@pytest.mark.parametrize(("quota", "expected"), [("50000 100000", 1), ("max 100000", None)])
def test_a_containers_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_CPU_MAX", tmp_path / "cpu.max")
    assert usable_cores() == (expected or len(os.sched_getaffinity(0)))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this build has CUDA"
)
def test_cuda_is_refused_where_the_build_has_none(file: Path) -> None:
    with pytest.raises(ConfigError, match="expected the package onnxruntime-gpu"):
        _loaded(onnx_models.double(file), provider="cuda")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"provider": "tpu"}, "onnxruntime.provider is 'tpu'; expected 'auto', 'cpu' or 'cuda'"),
        ({"providers": "cpu"}, "onnxruntime.providers is not a known key; did you mean 'provider'"),
    ],
)
def test_a_bad_table_is_refused(file: Path, table: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OnnxRuntimeEngine.read(onnx_models.double(file), table)
    assert message in str(caught.value)


def test_a_loop_that_an_example_keeps_going_for_ever_is_ended(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "MAX_PROBE_S", 0.05)
    read = _read(row_models.write(file, row_models.ENDLESS))
    assert read.why_not_batchable is not None


# --- outputs -------------------------------------------------------------------------------------


def _stalling(path: Path) -> Path:
    """y: x; slow: comes of a loop without end."""
    onnx_models.stalls_alone(path)
    model = onnx.load(path)
    model.graph.output[0].name = "slow"
    model.graph.node[-1].output[0] = "slow"
    model.graph.node.append(node("Identity", "x", "y"))
    y = onnx.helper.make_tensor_value_info("y", FLOAT, ["batch", 3])
    model.graph.output.append(y)
    onnx.save(model, path)
    return path


def test_an_output_that_model_toml_leaves_out_is_not_computed(file: Path) -> None:
    _stalling(file)
    spec = replace(spec_of(file, {}), config=ModelConfig(lanes=1, outputs=("y",)))
    x = np.full((1, 3), 2 * onnx_models.ODD_ABOVE, np.float32)
    (lane,) = OnnxRuntimeEngine(spec).load().lanes
    outputs = lane.run(Batch([{"x": x}], 1, 1))  # else it would take for ever
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], x)


def test_leaving_outputs_out_finds_weights_in_files_of_their_own(file: Path) -> None:
    onnx_models.external(file, "weights.bin")
    (file.parent / "weights.bin").write_bytes(np.arange(4, dtype="f4").tobytes())
    model = onnx.load(file, load_external_data=False)
    model.graph.node.append(node("Neg", ["y"], ["z"]))
    z = onnx.helper.make_tensor_value_info("z", FLOAT, ["batch", 4])
    model.graph.output.append(z)
    file.write_bytes(model.SerializeToString())
    spec = replace(spec_of(file, {}), config=ModelConfig(lanes=1, outputs=("z",)))
    (lane,) = OnnxRuntimeEngine(spec).load().lanes
    outputs = lane.run(Batch([{"x": np.ones((1, 4), "f4")}], 1, 1))
    assert {name: array.tolist() for name, array in outputs.items()} == {"z": [[-1, -2, -3, -4]]}


# --- knobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"intra_op_num_threads": 0}, "onnxruntime.intra_op_num_threads is 0; expected at least 1"),
        ({"intra_op_num_threads": 257}, "is 257; expected at most 256"),
        ({"inter_op_num_threads": 2}, 'is 2; expected 1, or execution_mode = "parallel"'),
        ({"execution_mode": "both"}, "is 'both'; expected 'sequential' or 'parallel'"),
        ({"graph_optimization_level": 99}, "is 99; expected 'disable', 'basic', 'extended' or"),
        ({"arena": False}, "onnxruntime.arena is False; expected 'on', 'off' or 'shrink'"),
        ({"mem_pattern": 1}, "onnxruntime.mem_pattern is 1; expected true or false"),
        (
            {"provider_options": {"gpu_mem_limits": 1}},
            "onnxruntime.provider_options.gpu_mem_limits is not a known key",
        ),
        (
            {"provider": "cpu", "provider_options": {"device_id": 0}},
            "onnxruntime.provider_options has device_id; expected none, as provider is 'cpu'",
        ),
        (
            {"provider_options": {"gpu_mem_limit": 3}},
            "onnxruntime.provider_options.gpu_mem_limit is 3; expected at least 1048576",
        ),
        ({"custom_ops": ["./ops.so"]}, "onnxruntime.custom_ops.0 is './ops.so'; expected a file"),
        ({"custom_ops": ["no_such_ops"]}, "custom_ops.0 is 'no_such_ops'; expected a file (with a"),
    ],
)
def test_a_knob_out_of_its_range_is_named(file: Path, table: dict[str, Any], message: str) -> None:
    onnx_models.double(file)
    with pytest.raises(ConfigError) as caught:
        OnnxRuntimeEngine.read(file, table)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "table",
    [
        {"intra_op_num_threads": 2},
        {"execution_mode": "parallel", "inter_op_num_threads": 2},
        *({"graph_optimization_level": level} for level in ("disable", "basic", "extended", "all")),
        *({"arena": arena} for arena in ("on", "off", "shrink")),
        {"mem_pattern": True},
    ],
    ids=str,
)
def test_a_model_gives_the_same_answers_whatever_its_knobs(
    file: Path, table: dict[str, Any]
) -> None:
    x = np.arange(12, dtype="f4").reshape(4, 3)
    (lane,) = _loaded(onnx_models.double(file), **table).lanes
    for _ in range(2):
        np.testing.assert_array_equal(lane.run(Batch([{"x": x}], 4, 4))["y"], 2 * x)


def test_more_threads_a_run_leave_fewer_lanes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "usable_cores", lambda: 8)
    onnx_models.double(file)
    for table, lanes in (
        ({}, 8),
        ({"intra_op_num_threads": 4}, 2),
        ({"intra_op_num_threads": 3}, 2),
        ({"intra_op_num_threads": 16}, 1),
        ({"execution_mode": "parallel", "inter_op_num_threads": 2, "intra_op_num_threads": 2}, 2),
    ):
        assert len(_loaded(file, lanes=0, **table).lanes) == lanes
    assert len(_loaded(file, lanes=3, intra_op_num_threads=4).lanes) == 3


def test_operators_that_are_lacking_are_told_with_the_knob(file: Path) -> None:
    file.parent.mkdir(parents=True)
    custom = real_models.parsed(
        "g (float[batch] x) => (float[batch] y) { y = ai.onnx.contrib.Own(x) }",
        '<ir_version: 10, opset_import: ["" : 21, "ai.onnx.contrib" : 1]>',
    )
    file.write_bytes(custom.SerializeToString())
    with pytest.raises(ConfigError, match=r"custom_ops in \[onnxruntime\] of model.toml names"):
        OnnxRuntimeEngine.read(file, {})
