"""Requests share batches only where runs showed that their answers do not depend on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers import onnx_models, row_models
from helpers.row_models import INDEPENDENT, MIXED, UNTOLD

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Signature, Tensors, TensorSpec
from inferq.workers.models.repository import load_model
from inferq.workers.models.signatures import Declared, Examined, examine
from inferq.workers.models.spec import ModelSpec
from inferq.workers.row_probe import examples, rows

PLAIN = Signature(
    (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),)
)


def _spec(root: Path, text: str, toml: str = "") -> ModelSpec:
    path = row_models.write(root / "m" / "1" / "model.onnx", text)
    (path.parents[1] / "model.toml").write_text(toml)
    return load_model(root, "m")


def _shown(run: rows.Probe) -> Examined:
    """What is found out of a model of float32[batch, 4] → float32[batch, 4]."""
    return examine(Declared(PLAIN, run))


# --- rows that depend on each other --------------------------------------------------------------


@pytest.mark.parametrize("name", MIXED)
def test_a_model_whose_rows_depend_on_each_other_runs_request_by_request(
    tmp_path: Path, name: str
) -> None:
    spec = _spec(tmp_path, MIXED[name])
    assert not spec.batchable
    assert spec.max_batch_size == 1
    assert spec.why_not_batchable is not None
    assert spec.why_not_batchable.startswith("answers depend on the rows beside them: output '")
    assert "batchable = true in model.toml" in spec.why_not_batchable
    # Whatever dim 0 its file allows is taken.
    assert spec.signature.inputs[0].shape[0] == "batch"


@pytest.mark.parametrize("name", UNTOLD)
def test_a_model_whose_outputs_have_another_number_of_rows_is_never_batched(
    tmp_path: Path, name: str
) -> None:
    why = _spec(tmp_path, UNTOLD[name]).why_not_batchable
    assert why is not None
    assert "batchable = true" not in why
    with pytest.raises(ConfigError) as caught:
        _spec(tmp_path, UNTOLD[name], "batchable = true")
    assert "model.toml: batchable is true; expected false, or none, since " in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_model_whose_rows_are_independent_is_batched(tmp_path: Path, name: str) -> None:
    spec = _spec(tmp_path, INDEPENDENT[name])
    assert spec.why_not_batchable is None
    assert spec.batch_symbol == "batch"


def test_a_quantised_model_that_scales_by_the_batch_says_by_how_much_rows_differ(
    tmp_path: Path,
) -> None:
    why = _spec(tmp_path, MIXED["scaled by the largest"]).why_not_batchable
    assert why is not None
    assert "output 'y' of a row differs by " in why
    assert " %), cosine 0.99" in why
    assert " to 0.99" in why


# --- model.toml says so --------------------------------------------------------------------------


def test_model_toml_may_have_rows_batched_though_they_differ(tmp_path: Path) -> None:
    spec = _spec(tmp_path, MIXED["scaled by the largest"], "batchable = true\nmax_batch_size = 8")
    assert spec.batchable
    assert spec.max_batch_size == 8
    assert spec.batch_symbol == "batch"
    assert spec.remark is not None
    assert spec.remark.startswith("model.toml says so, though answers depend on the rows beside")
    assert spec.advert(0.0, 600).batchable


def test_model_toml_may_have_a_model_run_request_by_request(tmp_path: Path) -> None:
    spec = _spec(tmp_path, INDEPENDENT["doubled"], "batchable = false")
    assert not spec.batchable
    assert spec.batch_symbol is None
    assert spec.why_not_batchable == "model.toml says batchable = false"
    assert str(spec.signature) == "(x: float32[batch, 4]) -> (y: float32[batch, 4])"
    assert not spec.advert(0.0, 600).batchable


def test_more_than_one_row_is_refused_where_model_toml_says_request_by_request(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"since the model is not batchable: model\.toml says"):
        _spec(tmp_path, INDEPENDENT["doubled"], "batchable = false\nmax_batch_size = 4")


def test_a_model_of_fixed_rows_cannot_be_declared_batchable(tmp_path: Path) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx", (1, 3))
    (tmp_path / "m" / "model.toml").write_text("batchable = true")
    with pytest.raises(ConfigError, match=r"batchable is true; .* is fixed at 1"):
        load_model(tmp_path, "m")


def test_the_fake_engine_obeys_the_knob_too(tmp_path: Path) -> None:
    table = '[fake]\ninputs = [{ name = "x", dtype = "float32", shape = ["batch", 4] }]'
    (tmp_path / "m").mkdir()
    toml = tmp_path / "m" / "model.toml"
    for knob, batchable in (("", True), ("batchable = true", True), ("batchable = false", False)):
        toml.write_text(f'engine = "fake"\n{knob}\n{table}')
        assert load_model(tmp_path, "m").batchable is batchable
    toml.write_text(f'engine = "fake"\nbatchable = true\n{table.replace("batch", "1")}')
    toml.write_text(toml.read_text().replace('"1"', "1"))
    with pytest.raises(ConfigError, match="is fixed at 1"):
        load_model(tmp_path, "m")


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_each_engine_of_onnx_files_obeys_what_was_found(tmp_path: Path, engine: str) -> None:
    toml = f'engine = "{engine}"'
    assert not _spec(tmp_path, MIXED["a twentieth of the mean"], toml).batchable
    assert _spec(tmp_path, MIXED["a twentieth of the mean"], f"{toml}\nbatchable = true").batchable
    assert _spec(tmp_path, INDEPENDENT["doubled"], toml).batchable


# --- what is no dependence -----------------------------------------------------------------------


def test_rounding_otherwise_by_oneself_than_in_company_is_no_dependence() -> None:
    def run(inputs: Tensors) -> Mapping[str, Array]:
        x = inputs["x"]
        return {"y": x * np.float32(1 + 1e-6) if len(x) == 1 else x}

    assert _shown(run).why_not_batchable is None


def test_rounding_that_the_model_makes_larger_on_some_inputs_is_no_dependence() -> None:
    def run(inputs: Tensors) -> Mapping[str, Array]:
        x = inputs["x"]
        unusual = (np.abs(x) < 1).all()
        return {"y": x * np.float32(1.02) if len(x) == 1 and unusual else x}

    assert _shown(run).why_not_batchable is None


def test_a_difference_between_one_row_and_several_on_all_inputs_is_a_dependence() -> None:
    def run(inputs: Tensors) -> Mapping[str, Array]:
        x = inputs["x"]
        return {"y": x + np.float32(0.01) if len(x) == 1 else x}

    why = _shown(run).why_not_batchable
    assert why is not None
    assert "differs by 0.01" in why


def test_of_outputs_that_vary_from_run_to_run_nothing_shows_that_rows_are_independent() -> None:
    """The noise may hide that they are not."""
    rng = np.random.default_rng()

    def run(inputs: Tensors) -> Mapping[str, Array]:
        x = inputs["x"]
        return {"y": x + x.mean() + 0.001 * rng.random(4, np.float32)}

    varies = "its outputs vary from run to run ('y'), so that only shapes could be compared"
    assert str(_shown(run).why_not_batchable).startswith(varies)


def test_a_model_that_rounds_otherwise_from_run_to_run_is_still_judged() -> None:
    rng = np.random.default_rng()

    def run(inputs: Tensors, of_mean: float = 0.0) -> Mapping[str, Array]:
        x = inputs["x"] + np.float32(of_mean) * inputs["x"].mean()
        return {"y": x * (1 + rng.random(4, np.float32) * np.float32(1e-6))}

    assert _shown(run).why_not_batchable is None
    assert _shown(lambda inputs: run(inputs, 0.01)).why_not_batchable is not None


# --- what does not fit ---------------------------------------------------------------------------


def test_sizes_of_batches_that_the_model_refuses_tell_nothing() -> None:
    def run(inputs: Tensors, least: int = 2, most: int = 4) -> Mapping[str, Array]:
        if not least <= len(inputs["x"]) <= most:
            raise ValueError("of another size")
        return {"y": inputs["x"]}

    assert _shown(run).why_not_batchable is None
    assert _shown(lambda inputs: run(inputs, 1, 2)).why_not_batchable is None
    why = _shown(lambda inputs: run(inputs, 2, 2)).why_not_batchable
    assert why is not None
    assert why.startswith("no example could be run to see whether its rows are independent (of an")


def test_rows_of_which_five_are_too_much_are_tried_in_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(examples, "MAX_ELEMENTS", 4 * examples.ROWS - 1)
    most = 0

    def run(inputs: Tensors, of_mean: float = 0.0) -> Mapping[str, Array]:
        nonlocal most
        x = inputs["x"]
        most = max(most, len(x))
        return {"y": x + np.float32(of_mean) * x.mean()}

    assert _shown(run).why_not_batchable is None
    assert most == 2
    assert _shown(lambda inputs: run(inputs, 1e-4)).why_not_batchable is not None
    monkeypatch.setattr(examples, "MAX_ELEMENTS", 4 * examples.FEWER_ROWS - 1)
    why = _shown(run).why_not_batchable
    assert why is not None
    assert "(an example would be too large)" in why


def test_a_slow_model_is_tried_on_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    now = 0.0

    def run(inputs: Tensors) -> Mapping[str, Array]:
        nonlocal now
        ran.append(len(inputs["x"]))
        now += 0.5 * len(inputs["x"])
        return {"y": inputs["x"]}

    monkeypatch.setattr(time, "process_time", lambda: now)
    assert _shown(run).why_not_batchable is None
    assert sum(ran) <= 20
    assert max(ran) <= 3


def test_a_slow_model_is_still_tried_on_rows_of_very_different_magnitude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def run(inputs: Tensors) -> Mapping[str, Array]:
        nonlocal now
        now += 20
        x = inputs["x"]
        return {"y": x + np.maximum(x - 1000, 0).mean()}

    monkeypatch.setattr(time, "process_time", lambda: now)
    assert _shown(run).why_not_batchable is not None


# --- what the log says ---------------------------------------------------------------------------


def test_what_the_model_refuses_is_not_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx_models.lookup(tmp_path / "m" / "1" / "model.onnx")
    assert load_model(tmp_path, "m").batchable
    assert capfd.readouterr() == ("", "")


def test_how_many_runs_it_took_is_told_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "inferq"):
        _shown(lambda inputs: {"y": inputs["x"]})
    assert " runs in " in caplog.text


# --- dims without a name -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["?", "", "None", "none", "-1", "*", "unknown", "Dynamic", "null", "undefined", "__"]
)
def test_two_dims_of_one_name_that_is_none_need_not_be_of_one_size(
    tmp_path: Path, name: str
) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx", (name, 3, name, name))
    spec = load_model(tmp_path, "m")
    assert str(spec.signature) == "(x: float32[batch, 3, ?, ?]) -> (y: float32[batch, 3, ?, ?])"
    assert spec.batchable


@pytest.mark.parametrize("name", ["height", "seq", "N", "s0", "dim_1", "x_dynamic_axes_1"])
def test_two_dims_of_one_name_are_of_one_size(tmp_path: Path, name: str) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx", ("batch", name, name))
    assert load_model(tmp_path, "m").signature.inputs[0].shape == ("batch", name, name)


def test_inputs_whose_first_dims_have_invented_names_are_batched(tmp_path: Path) -> None:
    for names in (
        ("a_dynamic_axes_1", "b_dynamic_axes_1"),
        ("unk__1", "unk__2"),
        ("DynamicDimension.0", "DynamicDimension.3"),
        ("?", "?"),
    ):
        onnx_models.two_inputs(tmp_path / "m" / "1" / "model.onnx", (names[0], 2), (names[1], 2))
        assert str(load_model(tmp_path, "m").signature.inputs[1]) == "b: float32[batch, 2]"


@pytest.mark.parametrize(
    "toml", ["[pad.'?']\nbuckets = [8]", "[profile]\n'?' = [1, 8, 64]"], ids=["pad", "profile"]
)
def test_tables_that_need_names_say_how_to_give_one(tmp_path: Path, toml: str) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx", ("batch", 3, "?", "?"))
    (tmp_path / "m" / "model.toml").write_text(toml)
    with pytest.raises(ConfigError) as caught:
        load_model(tmp_path, "m")
    assert "dim 2 of input 'x' has no name; give it one in the file" in str(caught.value)
    assert "shape.dim[2].dim_param = 'height'" in str(caught.value)
