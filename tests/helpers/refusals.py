"""Models of a repository, and why they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import onnx_models
from inferq.shared.errors import ConfigError
from inferq.workers.models.repository import load_model


def onnx_model(root: Path, name: str = "m", toml: str | None = None, version: int = 1) -> Path:
    """A doubling ONNX model float32[batch, 3]; returns its file."""
    if toml is not None:
        (root / name).mkdir(exist_ok=True)
        (root / name / "model.toml").write_text(toml)
    return onnx_models.double(root / name / str(version) / "model.onnx")


def refusal_of(root: Path, name: str = "m") -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(root, name)
    return caught.value.message
