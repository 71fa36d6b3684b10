"""A model's warm-up is remembered beside what it depends on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import onnx_models
from helpers.repository import fake_model

from inferq.workers.models.lane_threads import LaneThreads
from inferq.workers.models.registry import engine_class
from inferq.workers.models.repository import load_model
from inferq.workers.models.spec import ModelSpec
from inferq.workers.warmup.notes import Size
from inferq.workers.warmup.prepare import Preparation, Prepared


def _prepare(spec: ModelSpec) -> Prepared:
    preparation = Preparation(spec)
    preparation.start()
    loaded = engine_class(spec.config.engine)(spec).load()
    prepared = preparation.prepare(loaded, LaneThreads("m"))
    preparation.stop_blaming()
    loaded.close()
    return prepared


def _fake(tmp_path: Path, knobs: str = "", fake: str = "delay_ms = 2") -> ModelSpec:
    root = tmp_path / f"models-{len(list(tmp_path.iterdir()))}"
    fake_model(root, "m", knobs=knobs, fake=fake)
    return load_model(root, "m")


def _kept() -> list[Path]:
    return sorted((Path(os.environ["XDG_CACHE_HOME"]) / "inferq" / "warm-up").glob("*"))


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    spec = _fake(tmp_path, fake="delay_ms = 20")
    first, second = _prepare(spec), _prepare(spec)
    assert first.tuning is not None
    assert second.tuning is not None
    assert second.tuning.seconds == first.tuning.seconds
    (path,) = _kept()
    assert path.name.startswith("m.1.")


def test_another_engine_table_or_knob_is_measured_by_itself(tmp_path: Path) -> None:
    _prepare(_fake(tmp_path))
    _prepare(_fake(tmp_path, fake="delay_ms = 3"))
    _prepare(_fake(tmp_path, knobs="lanes = 2"))
    _prepare(_fake(tmp_path, knobs="max_batch_size = 8"))
    assert len(_kept()) == 4


def test_another_model_file_is_measured_by_itself(tmp_path: Path) -> None:
    for shape in (("batch", 3), ("batch", 4)):
        onnx_models.double(tmp_path / "models" / "m" / "1" / "model.onnx", shape)
        _prepare(load_model(tmp_path / "models", "m"))
    assert len(_kept()) == 2


def test_a_model_that_runs_request_by_request_keeps_nothing(tmp_path: Path) -> None:
    prepared = _prepare(_fake(tmp_path, knobs="max_batch_size = 1"))
    assert prepared.rows == 1
    assert _kept() == []


@pytest.mark.parametrize("warm_up", [True, False])
def test_without_a_sample_or_without_warm_up_nothing_runs(tmp_path: Path, warm_up: bool) -> None:
    path = tmp_path / "models" / "m" / "1" / "model.onnx"
    onnx_models.double(path, ("batch", "n") if warm_up else ("batch", 3))
    (path.parents[1] / "model.toml").write_text(f"warm_up = {str(warm_up).lower()}\n")
    prepared = _prepare(load_model(tmp_path / "models", "m"))
    assert prepared.tuning is None
    assert prepared.rows == 32


def test_what_a_profile_says_of_open_dims_is_run_on_any_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "models" / "m" / "1" / "model.onnx"
    onnx_models.double(path, ("batch", "n"))
    (path.parents[1] / "model.toml").write_text("[profile]\nn = [8, 16, 16]\n")
    prepared = _prepare(load_model(tmp_path / "models", "m"))
    assert prepared.tuning is not None
    assert prepared.row_elements == 16
    assert "is not warmed up" not in caplog.text


def test_a_model_of_which_nothing_says_how_large_it_is_is_told_to_be_untried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    onnx_models.double(tmp_path / "models" / "m" / "1" / "model.onnx", ("batch", "n"))
    _prepare(load_model(tmp_path / "models", "m"))
    (told,) = (each.getMessage() for each in caplog.records if "not warmed up" in each.getMessage())
    assert "nothing says how large dim 1 of input x: float32[batch, n] is" in told


def test_without_warm_up_a_size_that_ended_a_process_is_not_formed_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = _fake(tmp_path, knobs="warm_up = false")
    loaded = engine_class("fake")(spec).load()
    preparation = Preparation(spec)
    preparation.start()
    prepared = preparation.prepare(loaded, LaneThreads("m"))
    assert prepared.notes is not None
    # As if it was killed meanwhile: its lock is gone with it.
    trying = prepared.notes.trying(Size(20 * 4, 20))
    trying.__enter__()
    assert prepared.notes._file is not None
    os.close(prepared.notes._file)
    prepared.notes._file = None
    again = _prepare(spec)
    assert again.rows == 16
    assert again.fit.elements == 79
    assert "model m: batches of at most 16 rows, in place of 32, since 20 were the last" in (
        caplog.text
    )
    assert "max_batch_size = 16 says so" in caplog.text
    assert _prepare(spec).rows == 32, "once is no proof"


def test_files_that_cannot_be_read_only_cost_the_memory_of_it(tmp_path: Path) -> None:
    path = tmp_path / "models" / "m" / "1" / "model.onnx"
    onnx_models.double(path)
    spec = load_model(tmp_path / "models", "m")
    loaded = engine_class("onnxruntime")(spec).load()
    preparation = Preparation(replace(spec, path=tmp_path / "gone" / "model.onnx"))
    preparation.start()
    assert preparation.prepare(loaded, LaneThreads("m")).tuning is not None
