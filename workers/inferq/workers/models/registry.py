"""The engines, by the name that model.toml gives them; each is imported when it is first asked for.

A new engine is one more line in `ENGINES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.workers.models.engine import Engine


@dataclass(frozen=True)
class Registered:
    """Where an engine is found, without importing it."""

    #: Module and class, as ``package.module:Class``.
    target: str
    #: File names looked for in a version's folder, in order; empty: the engine needs no file.
    files: tuple[str, ...] = ()
    #: The extra that installs what it imports.
    extra: str = "worker"


#: In order of preference, where model.toml names none and a file fits several.
ENGINES: Final[Mapping[str, Registered]] = {
    "onnxruntime": Registered(
        "inferq.workers.engines.onnxruntime:OnnxRuntimeEngine", files=("model.onnx",)
    ),
    "torch": Registered(
        "inferq.workers.engines.torch:TorchEngine", files=("model.pt2",), extra="torch"
    ),
    # Only where model.toml asks for it: ONNX Runtime runs the same file anywhere.
    "tensorrt": Registered(
        "inferq.workers.trt.engine:TensorRTEngine", files=("model.onnx",), extra="tensorrt"
    ),
    "fake": Registered("inferq.workers.engines.fake:FakeEngine"),
}


def registered(name: str) -> Registered:
    """What is known of the engine `name`. ConfigError, listing the known ones, if nothing is."""
    known = ENGINES.get(name)
    if known is None:
        raise ConfigError(f"engine is {name!r}; expected one of {', '.join(ENGINES)}")
    return known


def engine_class(name: str) -> type[Engine]:
    """The class of the engine `name`.

    ConfigError: there is no such engine, or what it imports is not installed.
    """
    entry = registered(name)
    module_name, _, class_name = entry.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        raise ConfigError(
            f"engine {name!r} cannot be imported ({problem}); "
            f'to install what it needs: pip install "inferq[{entry.extra}]"'
        ) from problem
    found: type[Engine] = getattr(module, class_name)
    return found
