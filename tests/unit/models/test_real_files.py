"""What real ONNX files have, as model.toml may say it: outputs, versions, links, where rows are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import onnx_models, real_models
from helpers.refusals import onnx_model, refusal_of
from helpers.repository import fake_model

from inferq.workers.engines import onnx_edit
from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine
from inferq.workers.models.engine import Batch
from inferq.workers.models.repository import load_model

# --- outputs -------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_served_is_named_with_the_knob_that_leaves_it_out(
    tmp_path: Path,
) -> None:
    real_models.write(tmp_path, "seqout")
    refusal = refusal_of(tmp_path, "seqout")
    assert "output 'parts' of the model is a seq(tensor(float)); expected a tensor of" in refusal
    assert 'outputs = ["y"] in model.toml leaves it out' in refusal
    (tmp_path / "seqout" / "model.toml").write_text('outputs = ["parts"]')
    assert "is a seq(tensor(float))" in refusal_of(tmp_path, "seqout")
    (tmp_path / "seqout" / "model.toml").write_text('outputs = ["y"]')
    spec = load_model(tmp_path, "seqout")
    assert str(spec.signature) == "(x: float32[batch, 4]) -> (y: float32[batch, 4])"
    assert spec.batchable


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ('["z"]', "outputs has 'z'; expected names of its outputs: y, mean"),
        ('["y", "y"]', "outputs is ['y', 'y']; expected each name once"),
        ('"y"', "outputs is 'y'; expected a list"),
    ],
)
def test_outputs_that_there_are_not_are_refused_by_name(
    tmp_path: Path, outputs: str, message: str
) -> None:
    real_models.write(tmp_path, "scalar-out", f"outputs = {outputs}")
    refusal = refusal_of(tmp_path, "scalar-out")
    assert message in refusal
    assert "model.toml" in refusal


def test_maps_that_cannot_be_tensors_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_edit, "MAX_EDITED_BYTES", 0)
    onnx_models.classifier(tmp_path / "m" / "1" / "model.onnx")
    refusal = refusal_of(tmp_path)
    assert "output 'output_probability' of the model is a seq(map(" in refusal
    assert "export the classifier with zipmap=False" in refusal
    assert 'outputs = ["output_label"] in model.toml leaves it out' in refusal


def test_the_labels_of_a_classifier_are_those_of_its_file_unless_model_toml_has_others(
    tmp_path: Path,
) -> None:
    onnx_models.classifier(tmp_path / "m" / "1" / "model.onnx")
    assert load_model(tmp_path, "m").labels == ("cat", "dog", "owl")
    (tmp_path / "m" / "model.toml").write_text('labels = ["a", "b", "c"]')
    assert load_model(tmp_path, "m").labels == ("a", "b", "c")


# --- a pinned version, and links out of the repository -------------------------------------------


def test_a_pinned_version_is_served_though_there_are_newer_ones(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        onnx_model(tmp_path, version=version, toml="version = 2")
    spec = load_model(tmp_path, "m")
    assert (spec.version, spec.versions, spec.passed_over) == (2, (1, 2, 3), ())


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("4", "version is 4; expected one of 1, 2"),
        ("-1", "version is -1; expected at least 0"),
        ('"2"', "version is '2'; expected an integer"),
    ],
)
def test_a_pinned_version_that_there_is_not_is_refused(
    tmp_path: Path, version: str, message: str
) -> None:
    for each in (1, 2):
        onnx_model(tmp_path, version=each, toml=f"version = {version}")
    assert message in refusal_of(tmp_path)


def test_no_other_version_stands_in_for_a_pinned_one_that_is_not_whole(tmp_path: Path) -> None:
    onnx_model(tmp_path, version=1)
    onnx_model(tmp_path, version=2, toml="version = 2").write_bytes(b"")
    assert "is empty; expected a model" in refusal_of(tmp_path)


def _cached(tmp_path: Path) -> tuple[Path, Path]:
    """A repository whose model links into a cache as Hugging Face lays it out; and that cache."""
    cache, root = tmp_path / "hub", tmp_path / "models"
    blobs, snapshot = cache / "models--a--b" / "blobs", cache / "models--a--b" / "snapshots" / "1f"
    onnx_models.external(blobs / "aa11", "model.onnx_data")
    (blobs / "bb22").write_bytes(np.arange(4, dtype="f4").tobytes())
    snapshot.mkdir(parents=True)
    folder = root / "m" / "1"
    folder.mkdir(parents=True)
    for name, blob in (("model.onnx", "aa11"), ("model.onnx_data", "bb22")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
        (folder / name).symlink_to(snapshot / name)
    return root, cache


def test_a_link_into_a_cache_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    root, cache = _cached(tmp_path)
    refusal = refusal_of(root)
    assert f"leads to {cache}" in refusal
    assert "INFERQ_TRUSTED_ROOTS" in refusal
    assert "cp -rL" in refusal


def test_a_link_into_a_trusted_folder_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = _cached(tmp_path)
    monkeypatch.setenv("INFERQ_TRUSTED_ROOTS", f"{tmp_path}/other{os.pathsep}{cache}")
    (tmp_path / "other").mkdir()
    spec = load_model(root, "m")
    assert spec.batchable
    (lane, *_) = OnnxRuntimeEngine(spec).load().lanes
    outputs = lane.run(Batch([{"x": np.ones((1, 4), "f4")}], 1, 1))
    assert outputs["y"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("roots", ["hub", "/nowhere/at/all", "/"])
def test_a_trusted_folder_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots: str
) -> None:
    root, _ = _cached(tmp_path)
    monkeypatch.setenv("INFERQ_TRUSTED_ROOTS", roots)
    assert f"INFERQ_TRUSTED_ROOTS has {roots!r}; expected absolute paths" in refusal_of(root)


# --- where rows are ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("batch_axis = { h1 = 1 }", "batch_axis names 'h1'; expected an input or output: x, h0,"),
        ("batch_axis = { h0 = 3 }", "batch_axis.h0 is 3; expected less than 3, the number of dims"),
        ("batch_axis = { h0 = -1 }", "batch_axis.h0 is -1; expected at least 0"),
        ("batch_axis = 1", "batch_axis is 1; expected a table"),
    ],
)
def test_a_batch_axis_that_there_is_not_is_refused(tmp_path: Path, toml: str, message: str) -> None:
    real_models.write(tmp_path, "lstm", toml)
    assert message in refusal_of(tmp_path, "lstm")


def test_the_axis_of_rows_is_told_to_clients(tmp_path: Path) -> None:
    real_models.write(tmp_path, "lstm", "batch_axis = { h0 = 1, c0 = 1, hn = 1, cn = 1 }")
    spec = load_model(tmp_path, "lstm")
    assert spec.why_not_batchable is None
    signature = spec.advert(0.0, 60).signature
    assert str(signature.inputs[1]) == "h0: float32[1, batch, 3]"
    assert signature.batch_symbol == "batch"
    assert str(spec.signature.inputs[1]) == "h0: float32[batch, 1, 3]"


def test_another_engine_takes_rows_in_dim_0_only(tmp_path: Path) -> None:
    fake_model(tmp_path, "m", knobs="batch_axis = { x = 1 }")
    assert "batch_axis is {'x': 1}; expected none: engine 'fake' takes rows in dim 0" in refusal_of(
        tmp_path
    )


def test_a_fixed_batch_of_independent_rows_is_the_only_size(tmp_path: Path) -> None:
    real_models.write(tmp_path, "fixed8")
    spec = load_model(tmp_path, "fixed8")
    assert str(spec.signature) == "(x: float32[batch, 3]) -> (y: float32[batch, 3])"
    assert (spec.max_batch_size, spec.config.buckets) == (8, (8,))
    for toml, message in (
        ("max_batch_size = 9", "max_batch_size is 9; expected at most 8, at which"),
        ("buckets = [4, 8]", "buckets is [4, 8]; expected none, since the batch is fixed at 8"),
    ):
        (tmp_path / "fixed8" / "model.toml").write_text(toml)
        assert message in refusal_of(tmp_path, "fixed8")
    (tmp_path / "fixed8" / "model.toml").write_text("batchable = false")
    assert str(load_model(tmp_path, "fixed8").signature.inputs[0]) == "x: float32[8, 3]"
    real_models.write(tmp_path, "fixed8-mixed")
    why = load_model(tmp_path, "fixed8-mixed").why_not_batchable
    assert why is not None
    assert why.startswith("dim 0 of its inputs is fixed at 8, and answers depend on the rows")
