"""What serves a model where there is no GPU, or none is to be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: What runs the same file in place of an engine that needs a GPU.
INSTEAD: Final[Mapping[str, str]] = {"tensorrt": "onnxruntime"}
#: What an engine's own table of model.toml must say to keep it on the CPU.
_CPU_KEYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "onnxruntime": {"provider": "cpu"},
    "torch": {"device": "cpu"},
}


def cpu_engine(
    engine: str, tables: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any]]:
    """The engine that serves on the CPU what `engine` does, and its table out of `tables`."""
    chosen = INSTEAD.get(engine, engine)
    return chosen, {**tables.get(chosen, {}), **_CPU_KEYS.get(chosen, {})}
