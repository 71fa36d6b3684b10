"""TensorRT for tests: skips where TensorRT-RTX, which builds without a GPU, is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferq.workers.models.repository import load_model
from inferq.workers.trt.api import RTX
from inferq.workers.trt.builder import BuildRequest
from inferq.workers.trt.flavours import Flavour, find_flavour

REASON = "TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13"


def rtx() -> Flavour:
    """The flavour that builds everywhere."""
    pytest.importorskip("tensorrt_rtx", reason=REASON)
    return find_flavour(RTX)


def order(root: Path, model: str, **given: object) -> BuildRequest:
    """An order for `model` of the repository `root`, built for no GPU in particular."""
    return BuildRequest(load_model(root, model), rtx(), **given)  # type: ignore[arg-type]
