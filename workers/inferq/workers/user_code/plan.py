"""What is to be loaded, and how: the same for all lanes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """One model's code, and the limits that hold for it."""

    #: The model's name, for logs.
    model: str
    path: Path
    #: ``cpu`` or ``cuda:0``.
    device: str
    #: ``[python.config]``.
    config: Mapping[str, Any]
    #: Seconds of one batch, and of loading.
    timeout_s: float
    load_timeout_s: float
    #: Bytes of the tensors of one batch, either way.
    most: int
    #: What is set in the environment of its processes.
    environment: Mapping[str, str]
