"""Tells of a model that runs on the CPU of a worker that has a GPU."""

from __future__ import annotations

import os
from typing import Final

#: In the environment of a worker that is pinned to a GPU.
PINNED: Final = "INFERQ_GPU"
#: Engine → what may be lacking where it has not found the GPU.
_MISSING: Final = {
    "onnxruntime": "the package onnxruntime-gpu in place of onnxruntime, or another provider than "
    '"cpu" in [onnxruntime] of model.toml',
    "torch": 'device = "cuda" in [torch] of model.toml',
}


def off_gpu(engine: str, device: str) -> str:
    """What a worker lacks to run a model of `engine` on the GPU it is pinned to; empty: nothing."""
    return lacking(engine) if PINNED in os.environ and device == "cpu" else ""


def lacking(engine: str) -> str:
    """What a worker lacks whose `engine` has not found its GPU; empty: it looks for none."""
    return _MISSING.get(engine, "")
