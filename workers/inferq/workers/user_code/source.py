"""Imports a model.py, and finds the class in it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Final

from inferq.model import Model
from inferq.shared.errors import ConfigError

_MAX_REASON_CHARS: Final = 500
_INSTALL: Final = "; expected it in the worker's environment (pip install …)"


def load_class(path: Path, module: str) -> type[Model]:
    """The one class in the file `path` that derives from Model; it is imported as `module`.

    ConfigError, with file and line: it cannot be imported; there is none, or several.
    """
    try:
        return _only_class(path, _imported(path, module))
    except ConfigError:
        raise
    except BaseException as problem:
        raise ConfigError(f"{told(problem, path)}{_hint(problem)}") from problem


def told(problem: BaseException, path: Path) -> str:
    """``<file>, line 3: ValueError: …``: where in the model's own folder it was raised."""
    text = " ".join(str(problem).split())
    if len(text) > _MAX_REASON_CHARS:
        text = text[:_MAX_REASON_CHARS] + "…"
    what = f"{type(problem).__name__}: {text}" if text else type(problem).__name__
    if isinstance(problem, SyntaxError) and problem.filename:
        return f"{problem.filename}, line {problem.lineno}: {what}"
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(path.parent)]
    if not own:
        return f"{path}: {what}"
    return f"{own[-1].filename}, line {own[-1].lineno}: {what}"


def _hint(problem: BaseException) -> str:
    return _INSTALL if isinstance(problem, ModuleNotFoundError) else ""


def _imported(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and others look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _only_class(path: Path, module: ModuleType) -> type[Model]:
    found = {
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Model) and each is not Model
    }
    bases = {base for each in found for base in each.__mro__[1:]}
    leaves = sorted(found - bases, key=lambda each: each.__name__)
    if len(leaves) != 1:
        names = ", ".join(each.__name__ for each in leaves) or "none"
        raise ConfigError(
            f"{path} has {names}; expected one class that derives from inferq.model.Model"
        )
    return leaves[0]
