"""GPUs for tests of what needs none: NVML is a fake, since there is no card."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

#: First in a worker's PYTHONPATH, it makes the fake what `import pynvml` finds.
NO_CARD = Path(__file__).parent / "no_card"


def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh fake in place of nvidia-ml-py: two cards; see `no_card/pynvml.py`."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    del sys.modules["pynvml"]
    monkeypatch.syspath_prepend(NO_CARD)
    return importlib.import_module("pynvml")
