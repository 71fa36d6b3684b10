"""The engines, by their names in model.toml. Each is imported when it is first needed.

inferq's own are in `ENGINES`. Another package adds one by an entry point ``package.module:Class``
of the group ``inferq.engines``, and names the model's file by one of the same name in the group
``inferq.engine_files``. Both are read from the metadata of installed packages, without an import.

The working directory is skipped wherever it is on Python's path: its content may only have been
copied or cloned, and an engine is code.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from inferq.shared.errors import ConfigError
from inferq.workers.models.engine import Engine, reason

logger = logging.getLogger(__name__)

GROUP: Final = "inferq.engines"
FILES_GROUP: Final = "inferq.engine_files"
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_TARGET: Final = re.compile(r"([\w.]+:\w+)\s*(?:\[\s*([\w.-]+)\s*\])?")
#: An entry point's value, as setuptools accepts it.
_FILE: Final = re.compile(r"\w+(?:\.\w+)*")


@dataclass(frozen=True)
class Registered:
    """Where an engine is, known without importing it."""

    #: Module and class, as ``package.module:Class``.
    target: str
    #: File names looked for in a version's folder, in order; empty: the engine needs no file.
    files: tuple[str, ...] = ()
    #: The extra that installs what it imports; empty: there is none.
    extra: str = "worker"
    #: The package that provides it.
    distribution: str = "inferq"

    @property
    def requirement(self) -> str:
        """The argument for pip install."""
        return f"{self.distribution}[{self.extra}]" if self.extra else self.distribution


#: inferq's own, in order of preference if model.toml names none and a file fits several.
ENGINES: Final[Mapping[str, Registered]] = {
    "onnxruntime": Registered(
        "inferq.workers.engines.onnxruntime:OnnxRuntimeEngine", files=("model.onnx",)
    ),
    "torch": Registered(
        "inferq.workers.engines.torch:TorchEngine", files=("model.pt2",), extra="torch"
    ),
    # Only if model.toml names it: ONNX Runtime runs the same file anywhere.
    "tensorrt": Registered(
        "inferq.workers.trt.engine:TensorRTEngine", files=("model.onnx",), extra="tensorrt"
    ),
    # After those: a model.py beside a model.onnx is perhaps what wrote it.
    "python": Registered("inferq.workers.engines.python:PythonEngine", files=("model.py",)),
    "fake": Registered("inferq.workers.engines.fake:FakeEngine"),
}


def engines() -> Mapping[str, Registered]:
    """All engines by name, inferq's own first. The first call reads the installed packages."""
    return {**ENGINES, **_installed()}


def model_files() -> tuple[str, ...]:
    """The names of models' files, in order of preference."""
    return tuple(dict.fromkeys(file for entry in engines().values() for file in entry.files))


def registered(name: str) -> Registered:
    """The engine `name`. ConfigError, which lists the known ones, if there is none."""
    known = engines().get(name)
    if known is None:
        raise ConfigError(f"engine is {name!r}; expected one of {', '.join(engines())}")
    return known


def engine_class(name: str) -> type[Engine]:
    """The class of the engine `name`.

    ConfigError if there is no such engine, if its imports are not installed, or if it is no engine.
    """
    entry = registered(name)
    module_name, _, class_name = entry.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        raise ConfigError(
            f"engine {name!r} cannot be imported ({problem}); "
            f'to install what it needs: pip install "{entry.requirement}"'
        ) from problem
    except (Exception, SystemExit) as problem:  # another package's module may raise anything
        raise ConfigError(
            f"engine {name!r} of {entry.distribution} cannot be imported: "
            f"{module_name} raised {type(problem).__name__}: {reason(problem)}"
        ) from problem
    found: Any = getattr(module, class_name, None)
    if (flaw := _flaw(found, name)) is not None:
        raise ConfigError(f"engine {name!r} of {entry.distribution}: {entry.target} {flaw}")
    cls: type[Engine] = found
    return cls


def _flaw(found: object, name: str) -> str | None:
    if not (isinstance(found, type) and issubclass(found, Engine)):
        return f"is {found!r}; expected a subclass of {Engine.__module__}.Engine"
    if lacking := sorted(found.__abstractmethods__) if inspect.isabstract(found) else []:
        return f"has no {', '.join(lacking)}; expected all that an engine has"
    if (own := getattr(found, "name", None)) != name:
        return f"has the name {own!r}; expected {name!r}, as it is registered"
    return None


# --- engines of other packages -------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """An entry point of `GROUP`, and the one of `FILES_GROUP` with the same name, if any."""

    distribution: str
    value: str
    file: str | None


@functools.cache
def _installed() -> Mapping[str, Registered]:
    """The engines of other packages. A bad one is logged in one line.

    If two packages have one of the same name, neither is used: which one came first would depend on
    the order of Python's path.
    """
    found: dict[str, list[_Found]] = {}
    for name, each in _entry_points():
        found.setdefault(name, []).append(each)
    known: dict[str, Registered] = {}
    for name, rivals in sorted(found.items()):
        if (problem := _why_unusable(name, rivals)) is not None:
            owners = " and ".join(sorted(each.distribution for each in rivals))
            logger.warning("the engine %r of %s is not used: %s", name, owners, problem)
            continue
        (each,) = rivals
        target, extra = _parts(each.value)
        files = () if each.file is None else (each.file,)
        known[name] = Registered(target, files, extra, each.distribution)
    return known


def _why_unusable(name: str, rivals: list[_Found]) -> str | None:
    from inferq.workers.models.config import ModelConfig  # noqa: PLC0415 - which imports this

    each = rivals[0]
    if name in ENGINES:
        return "inferq has one of that name; expected another"
    if name in ModelConfig.model_fields:
        return "model.toml has a knob of that name; expected another"
    if not _NAME.fullmatch(name):
        return "expected a name of at most 32 small letters, digits, _ and -, a letter first"
    if len(rivals) > 1:
        return "two packages have one of that name; uninstall one of them"
    if not _TARGET.fullmatch(each.value):
        return f"its entry point is {each.value!r}; expected package.module:Class"
    if each.file is not None and not _FILE.fullmatch(each.file):
        return f"its {FILES_GROUP} is {each.file!r}; expected a name of letters, digits, _ and ."
    return None


def _parts(value: str) -> tuple[str, str]:
    """The target and the extra of an entry point in the right form; else None."""
    match = _TARGET.fullmatch(value)
    assert match is not None
    return match[1], match[2] or ""


def _entry_points() -> Iterator[tuple[str, _Found]]:
    """The name and place of each engine, by the metadata of all installed packages."""
    seen: set[str] = set()
    for distribution in metadata.distributions(path=_trusted_path()):
        try:
            points = distribution.entry_points
            if not (targets := points.select(group=GROUP)):
                continue
            owner = distribution.name
            if owner in seen:  # later on the path: the first one is imported
                continue
            seen.add(owner)
            files = {point.name: point.value for point in points.select(group=FILES_GROUP)}
            yield from (
                (point.name, _Found(owner, point.value, files.get(point.name))) for point in targets
            )
        except Exception as problem:  # noqa: BLE001 - other packages' metadata may be anything
            where = getattr(distribution, "_path", "what is installed")
            logger.warning("the entry points of %s cannot be read: %r", where, problem)


def _trusted_path() -> list[str]:
    """Python's path without the working directory, which may be there under several names."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted, so nothing is in it
        here = ""
    return [entry for entry in sys.path if entry and os.path.realpath(entry) != here]
