"""``inferq run``: one request on a model of any engine, without Redis."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import onnx_models
from helpers.python_models import EXIT, POISONED, REFUSE, python_model
from helpers.repository import fake_model, numbered

from inferq.workers.cli import inferq

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("m", x=array)`` runs the command on the model m, with that input."""
    monkeypatch.setenv("INFERQ_REDIS_URL", "redis://127.0.0.1:1/0")

    def run(name: str, *args: str, **arrays: Any) -> Result:
        np.savez(tmp_path / "in.npz", **arrays)
        given = ["run", str(tmp_path / name), str(tmp_path / "in.npz"), *args]
        return CliRunner().invoke(inferq, given)

    return run


def test_a_model_of_any_engine_is_run_once(run: Run, tmp_path: Path) -> None:
    python_model(tmp_path, "code", POISONED)
    fake_model(tmp_path, "fake", knobs="lanes = 3\nbuckets = [4, 32]")
    (tmp_path / "onnx" / "1").mkdir(parents=True)
    onnx_models.double(tmp_path / "onnx" / "1" / "model.onnx")
    x = np.concatenate([numbered(1), numbered(2)])
    for name, engine, factor in (("code", "python", 2), ("fake", "fake", 1), ("onnx", "onnxr", 2)):
        found = run(name, x=x[:, :3] if name == "onnx" else x)
        assert found.exit_code == 0, found.output
        outputs, took, by = found.stdout.splitlines()
        assert outputs.startswith(("y: ", "x: "))
        assert f" {factor} {factor} {factor} " in outputs
        assert " ms, after " in took
        assert by.startswith(f"by {name} version 1 on {engine}")


def test_outputs_go_to_a_file_and_to_json(run: Run, tmp_path: Path) -> None:
    python_model(tmp_path, "m", POISONED)
    out = tmp_path / "out.npz"
    found = run("m", "--json", "-o", str(out), x=numbered(3))
    told = json.loads(found.stdout)
    assert told["outputs"] == {"y": {"dtype": "float32", "shape": [1, 4], "data": [[6.0] * 4]}}
    assert (told["model"], told["engine"], told["device"]) == ("m", "python", "cpu")
    with np.load(out) as written:
        assert np.array_equal(written["y"], numbered(6))


@pytest.mark.parametrize(
    ("value", "told"),
    [(REFUSE, "Error: six"), (EXIT, "Error: the process of lane 0 ended with status 3 while it")],
)
def test_a_request_that_fails_is_one_line(run: Run, tmp_path: Path, value: int, told: str) -> None:
    python_model(tmp_path, "m", POISONED)
    found = run("m", x=numbered(value))
    assert found.exit_code == 1
    assert [line for line in found.stderr.splitlines() if line.startswith(told)], found.stderr


def test_what_is_wrong_with_the_model_or_the_inputs_is_told(run: Run, tmp_path: Path) -> None:
    python_model(tmp_path, "bad", "x = 1\n")
    python_model(tmp_path, "good", POISONED)
    assert "bad/1/model.py has none; expected one class" in run("bad", x=numbered(1)).stderr
    assert "is no folder; expected a model's" in run("none", x=numbered(1)).stderr
    wrong = run("good", x=numbered(1).astype(float))
    assert "input 'x' of model 'good': dtype float64; expected float32" in wrong.stderr
