"""``inferq models DIR`` shows what can be served, and what cannot and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import onnx_models
from helpers.bad_models import OTHERS, write_others
from helpers.repository import fake_model

from inferq.workers.commands.models import models


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Result:
    """The command's result on a repository of three good models and a bad one."""
    monkeypatch.setenv("COLUMNS", "200")
    fake_model(tmp_path, "echo", knobs="lanes = 3\nmax_batch_size = 8", fake="delay_ms = 5")
    onnx_models.double(tmp_path / "one" / "1" / "model.onnx", (1, 3))
    for version in (1, 2):
        onnx_models.double(tmp_path / "two" / str(version) / "model.onnx")
    fake_model(tmp_path, "wrong", knobs="lane = 3")
    return CliRunner().invoke(models, [str(tmp_path)])


def _row(run: Result, model: str) -> str:
    return next(line for line in run.stdout.splitlines() if f" {model} " in line)


def test_each_model_is_shown_with_engine_versions_and_signature(run: Result) -> None:
    assert "onnxruntime" in _row(run, "two")
    assert " 1 2 " in _row(run, "two")
    assert "x: float32[batch, 3]" in _row(run, "two")
    assert "→ y: float32[batch, 3]" in run.stdout


def test_only_the_knobs_that_were_turned_are_shown(run: Result) -> None:
    assert "lanes = 3" in run.stdout
    assert "fake.delay_ms = 5" in run.stdout
    assert "≤ 8" in _row(run, "echo")
    assert "max_queue_depth" not in run.stdout


def test_a_model_that_is_not_batchable_says_why(run: Result) -> None:
    assert "no: dim 0 of input 'x' is fixed at 1" in " ".join(run.stdout.split())


def test_a_bad_model_is_listed_with_its_error_and_fails_the_command(run: Result) -> None:
    assert run.exit_code == 1
    assert "wrong/model.toml: lane is not a known key; did you mean 'lanes'?" in run.stderr
    assert "wrong" not in run.stdout


def test_a_newest_version_that_is_not_whole_is_told_and_fails_the_command(tmp_path: Path) -> None:
    for version in (1, 2):
        onnx_models.double(tmp_path / "m" / str(version) / "model.onnx")
    assert CliRunner().invoke(models, [str(tmp_path)]).exit_code == 0
    (tmp_path / "m" / "3").mkdir()
    run = CliRunner().invoke(models, [str(tmp_path)])
    assert run.exit_code == 1
    assert " 1 2 (3) " in _row(run, "m")
    assert run.stderr.startswith(f"inferq: passed over: m version 3: no model in {tmp_path}/m/3")


def test_what_is_no_model_is_passed_over_without_a_complaint(tmp_path: Path) -> None:
    fake_model(tmp_path, "echo")
    write_others(tmp_path)
    run = CliRunner().invoke(models, [str(tmp_path)])
    assert (run.exit_code, run.stderr) == (0, "")
    assert f"passed over: .hidden, README.md, {', '.join(OTHERS)}\n" in run.stdout


def test_a_good_repository_and_an_empty_one_succeed(tmp_path: Path) -> None:
    empty = CliRunner().invoke(models, [str(tmp_path)])
    assert (empty.exit_code, "no models in" in empty.stdout) == (0, True)
    fake_model(tmp_path, "echo")
    assert CliRunner().invoke(models, [str(tmp_path)]).exit_code == 0


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    run = CliRunner().invoke(models, [str(tmp_path / "none")])
    assert run.exit_code == 1
    assert "expected a folder" in run.stderr
