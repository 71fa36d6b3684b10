"""Which engine serves a model without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: Engine that needs a GPU → the engine that runs the same file on the CPU.
INSTEAD: Final[Mapping[str, str]] = {"tensorrt": "onnxruntime"}
#: The keys of an engine's own table that keep it on the CPU.
_CPU_KEYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "onnxruntime": {"provider": "cpu"},
    "torch": {"device": "cpu"},
    "python": {"device": "cpu"},
}


def cpu_engine(
    engine: str, tables: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any]]:
    """The engine that serves the model of `engine` on the CPU, and its table out of `tables`."""
    chosen = INSTEAD.get(engine, engine)
    return chosen, {**tables.get(chosen, {}), **_CPU_KEYS.get(chosen, {})}
