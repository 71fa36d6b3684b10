"""Chooses the version of a model to serve, the newest with complete files, and its engine."""

from __future__ import annotations

import logging
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferq.shared.errors import ConfigError
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Engine
from inferq.workers.models.folders import TOML, inside
from inferq.workers.models.model_files import Incomplete, check_whole
from inferq.workers.models.model_toml import ModelToml
from inferq.workers.models.not_served import NotServed, not_served
from inferq.workers.models.on_cpu import cpu_engine
from inferq.workers.models.registry import ENGINES, engine_class, engines, model_files, registered
from inferq.workers.models.validation import naming

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The version that is served, and the engine."""

    version: int
    engine: str
    cls: type[Engine]
    table: Mapping[str, Any]
    #: None for an engine that needs no file.
    path: Path | None


def newest_whole(
    root: Path, name: str, versions: Sequence[int], toml: ModelToml, *, on_cpu: bool
) -> tuple[Choice, list[NotServed]]:
    """The newest version with complete files, and the newer ones. ConfigError if there is none."""
    passed_over: list[NotServed] = []
    reasons: list[str] = []
    for version in reversed(versions):
        try:
            return _choice(root, name, version, toml, on_cpu=on_cpu), passed_over
        except Incomplete as problem:
            reasons.append(problem.message)
            passed_over.append(not_served(name, problem.message, version))
    raise ConfigError("; ".join(reasons))


def _choice(root: Path, name: str, version: int, toml: ModelToml, *, on_cpu: bool) -> Choice:
    """How that version is served. Raises Incomplete if files are missing, ConfigError."""
    version_folder = root / name / str(version)
    engine = toml.config.engine or _engine_for(version_folder)
    table = toml.tables.get(engine, {})
    instead = ""
    if on_cpu:
        named = engine
        engine, table = cpu_engine(named, toml.tables)
        instead = f", in place of {named}" if engine != named else ""
    with naming(root / name / TOML):
        entry, cls = registered(engine), engine_class(engine)
    path = _model_file(root, version_folder, entry.files) if entry.files else None
    if path is not None:
        check_whole(path)
    if on_cpu:
        logger.info(
            "model %r is served on the CPU by %s%s", name, engine, instead, extra=about(model=name)
        )
    return Choice(version, engine, cls, table, path)


def _engine_for(version_folder: Path) -> str:
    """The engine that takes a file there: the first of inferq's, or the only other one."""
    fitting = [
        engine
        for engine, entry in engines().items()
        if any((version_folder / file).exists() for file in entry.files)
    ]
    if not fitting:
        raise _no_model(version_folder, model_files())
    if fitting[0] not in ENGINES and len(fitting) > 1:
        raise ConfigError(
            f"several engines take the file in {version_folder}: {', '.join(fitting)}; expected "
            f'{TOML} to name one, as in engine = "{fitting[0]}"'
        )
    return fitting[0]


def _model_file(root: Path, version_folder: Path, files: Sequence[str]) -> Path:
    for file in files:
        path = version_folder / file
        if path.exists() or path.is_symlink():
            real = inside(root, path)
            if not real.is_file():
                raise Incomplete(f"{path} is no file; expected a model")
            _warn_if_open(real)
            return path
    raise _no_model(version_folder, files)


def _no_model(version_folder: Path, files: Sequence[str]) -> Incomplete:
    for file in files:
        misplaced = version_folder.parent / file
        if misplaced.exists():
            return Incomplete(
                f"{misplaced} is in no version's folder; expected {version_folder / file}"
            )
    *others, last = files
    expected = f"{', '.join(others)} or {last}" if others else last
    return Incomplete(f"no model in {version_folder}; expected {expected} there")


def _warn_if_open(path: Path) -> None:
    for place in (path, path.parent):
        if place.stat().st_mode & stat.S_IWOTH:
            logger.warning("%s may be written by any user: a model is as good as code", place)
