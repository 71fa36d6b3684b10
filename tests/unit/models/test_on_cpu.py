"""A model whose model.toml wants a GPU is served on a machine that has none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers import onnx_models
from helpers.repository import fake_model

from inferq.shared.errors import ConfigError
from inferq.workers.models.on_cpu import cpu_engine
from inferq.workers.models.registry import ENGINES, Registered
from inferq.workers.models.repository import load_model


@pytest.mark.parametrize(
    ("engine", "chosen", "table"),
    [
        ("tensorrt", "onnxruntime", {"provider": "cpu"}),
        ("onnxruntime", "onnxruntime", {"provider": "cpu"}),
        ("torch", "torch", {"device": "cpu", "threads": 2}),
        ("fake", "fake", {"delay_ms": 5}),
    ],
)
def test_the_engine_and_its_table(engine: str, chosen: str, table: dict[str, object]) -> None:
    tables: dict[str, dict[str, object]] = {
        "tensorrt": {"graphs": True},
        "onnxruntime": {"provider": "cuda"},
        "torch": {"device": "cuda", "threads": 2},
        "fake": {"delay_ms": 5},
    }
    assert cpu_engine(engine, tables) == (chosen, table)


def test_an_engine_that_cannot_be_imported_here_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = Registered("inferq.no_such_module:Engine", files=("model.onnx",))
    monkeypatch.setitem(ENGINES, "tensorrt", absent)
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "model.toml").write_text(
        'engine = "tensorrt"\nmax_batch_size = 8\n[tensorrt]\nprecision = "fp16"\n'
    )
    with pytest.raises(ConfigError, match="engine 'tensorrt' cannot be imported"):
        load_model(tmp_path, "m")
    with caplog.at_level(logging.INFO):
        spec = load_model(tmp_path, "m", on_cpu=True)
    assert spec.config.engine == "onnxruntime"
    assert spec.engine_table == {"provider": "cpu"}
    assert spec.max_batch_size == 8
    assert caplog.messages == [
        "model 'm' is served on the CPU by onnxruntime, in place of tensorrt"
    ]


def test_without_the_file_that_the_cpu_needs_it_is_named(tmp_path: Path) -> None:
    fake_model(tmp_path, "m")
    (tmp_path / "m" / "model.toml").write_text('engine = "tensorrt"\n')
    with pytest.raises(ConfigError, match=r"expected model\.onnx there"):
        load_model(tmp_path, "m", on_cpu=True)


def test_all_else_stays_as_it_is(tmp_path: Path) -> None:
    fake_model(tmp_path, "m", knobs="lanes = 2", fake="delay_ms = 5")
    assert load_model(tmp_path, "m", on_cpu=True) == load_model(tmp_path, "m")
