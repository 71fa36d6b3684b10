"""The model repository: ``models/<name>/model.toml`` and ``models/<name>/<version>/model.onnx``.

Versions are whole numbers; the highest is served. A model is as good as code: nothing is followed
out of the repository (symbolic links included), and files that anyone may write are warned of, not
refused, since some container mounts make every file so.
"""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from inferq.shared.errors import ConfigError
from inferq.shared.names import is_model_name
from inferq.shared.schema import ModelAdvert, Signature
from inferq.workers.engines import ENGINES, engine_class, registered
from inferq.workers.engines.on_cpu import cpu_engine
from inferq.workers.logs.fields import about
from inferq.workers.model_config import ModelConfig, ModelToml, check_pad, check_profile, read_toml
from inferq.workers.signatures import examine
from inferq.workers.validation import TableError

logger = logging.getLogger(__name__)

TOML: Final = "model.toml"
MAX_LABELS_BYTES: Final = 16 << 20
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class ModelSpec:
    """One model of the repository, read and checked but not loaded."""

    name: str
    #: The version served, and all there are, ascending.
    version: int
    versions: tuple[int, ...]
    #: The model's file; None for an engine that needs none.
    path: Path | None
    config: ModelConfig
    #: The engine's own table of model.toml.
    engine_table: Mapping[str, Any]
    signature: Signature
    #: Rows; 1 if the model is not batchable.
    max_batch_size: int
    labels: tuple[str, ...]
    #: Why the model runs request by request; None if requests share batches.
    why_not_batchable: str | None = None
    #: What whoever serves it should know of its rows.
    remark: str | None = None

    @property
    def batchable(self) -> bool:
        return self.why_not_batchable is None

    @property
    def batch_symbol(self) -> str | None:
        """What the signature calls the batch; None if the model is not batchable."""
        return self.signature.batch_symbol if self.batchable else None

    def advert(self, seconds_per_row: float, result_expires_s: int) -> ModelAdvert:
        """What a worker that serves this model announces."""
        config = self.config
        return ModelAdvert(
            name=self.name,
            version=self.version,
            engine=config.engine,
            signature=self.signature,
            max_batch_size=self.max_batch_size,
            batchable=self.batchable,
            max_queue_depth=config.max_queue_depth,
            max_queue_bytes=config.max_queue_bytes,
            max_request_bytes=config.max_request_bytes,
            default_priority=config.priority,
            default_timeout_ms=config.timeout_ms,
            seconds_per_row=seconds_per_row,
            padded=tuple(config.pad),
            result_expires_s=result_expires_s,
        )


def model_names(root: Path) -> list[str]:
    """The models' folders in the repository `root`, sorted. ConfigError if `root` is no folder.

    Names are not checked: `load_model` does that. Hidden folders are no models.
    """
    if not root.is_dir():
        raise ConfigError(f"model repository is {str(root)!r}; expected a folder")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")


def load_repository(root: Path) -> dict[str, ModelSpec]:
    """Every model in `root` by its name. ConfigError, listing all that is wrong with any."""
    found: dict[str, ModelSpec] = {}
    problems: list[str] = []
    for name in model_names(root):
        try:
            found[name] = load_model(root, name)
        except ConfigError as problem:
            problems.append(problem.message)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def load_model(root: Path, name: str, *, on_cpu: bool = False) -> ModelSpec:
    """The model `name` in the repository `root`. ConfigError naming file, value, expectation.

    `on_cpu`: as a machine without a GPU serves it, whatever its model.toml says of one.
    """
    if not is_model_name(name):
        raise ConfigError(
            f"model name is {name!r}; expected letters, digits, _ . - (at most 100, "
            "the first none of . -)"
        )
    if not root.is_dir():
        raise ConfigError(f"model repository is {str(root)!r}; expected a folder")
    folder = _inside(root, root / name)
    if not folder.is_dir():
        raise ConfigError(f"model {name!r}: no folder {str(root / name)!r} in the repository")
    toml_path = root / name / TOML
    toml = ModelToml(ModelConfig(), {})
    if toml_path.exists() or toml_path.is_symlink():
        with _naming(toml_path):
            toml = read_toml(_inside(root, toml_path))
    versions = _versions(folder)
    version_folder = root / name / str(versions[-1])
    engine = toml.config.engine or _engine_for(version_folder)
    table = toml.tables.get(engine, {})
    if on_cpu:
        named = engine
        engine, table = cpu_engine(named, toml.tables)
        instead = f", in place of {named}" if engine != named else ""
        logger.info(
            "model %r is served on the CPU by %s%s", name, engine, instead, extra=about(model=name)
        )
    with _naming(toml_path):
        entry, cls = registered(engine), engine_class(engine)
    path = _model_file(root, version_folder, entry.files) if entry.files else None
    with _naming(toml_path if path is None else path, tables=toml_path):
        declared = cls.read(path, table)
    config = toml.config.model_copy(update={"engine": engine})
    with _naming(toml_path):
        examined = examine(declared, config.batchable, config.known_sizes)
        signature = examined.signature
        check_pad(config.pad, signature)
        check_profile(config.profile, signature)
        return ModelSpec(
            name=name,
            version=versions[-1],
            versions=versions,
            path=path,
            config=config,
            engine_table=table,
            signature=signature,
            max_batch_size=_max_batch_size(config, examined.why_not_batchable),
            labels=_labels(folder, config),
            why_not_batchable=examined.why_not_batchable,
            remark=examined.remark,
        )


@contextmanager
def _naming(path: Path, *, tables: Path | None = None) -> Iterator[None]:
    """Put `path` before the message of a ConfigError that does not name it.

    `tables`: what a TableError is of, if that is another file.
    """
    try:
        yield
    except ConfigError as problem:
        place = tables if tables is not None and isinstance(problem, TableError) else path
        if str(place) in problem.message:
            raise
        raise ConfigError(f"{place}: {problem.message}") from problem.__cause__


def _inside(root: Path, path: Path) -> Path:
    """`path` with its links followed. ConfigError if that leads out of `root`."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as problem:
        raise ConfigError(f"{path} cannot be followed: {problem}") from problem
    if not real.is_relative_to(root.resolve()):
        raise ConfigError(f"{path} leads to {real}; expected a place in the repository {root}")
    return real


def _versions(folder: Path) -> tuple[int, ...]:
    found = sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if _VERSION.fullmatch(entry.name) and entry.is_dir()
    )
    # An engine that needs no file needs no version's folder either.
    return tuple(found) or (1,)


def _engine_for(version_folder: Path) -> str:
    for engine, entry in ENGINES.items():
        if any((version_folder / file).exists() for file in entry.files):
            return engine
    files = sorted({file for entry in ENGINES.values() for file in entry.files})
    raise ConfigError(f"no model in {version_folder}; expected {' or '.join(files)} there")


def _model_file(root: Path, version_folder: Path, files: Sequence[str]) -> Path:
    for file in files:
        path = version_folder / file
        if path.exists() or path.is_symlink():
            real = _inside(root, path)
            if not real.is_file():
                raise ConfigError(f"{path} is no file; expected a model")
            _warn_if_open(real)
            return path
    raise ConfigError(f"no model in {version_folder}; expected {' or '.join(files)} there")


def _warn_if_open(path: Path) -> None:
    for place in (path, path.parent):
        if place.stat().st_mode & stat.S_IWOTH:
            logger.warning("%s may be written by any user: a model is as good as code", place)


def _max_batch_size(config: ModelConfig, reason: str | None) -> int:
    if reason is None:
        return config.max_batch_size or config.default_max_batch_size
    for key, largest in (
        ("max_batch_size", config.max_batch_size),
        ("buckets", max(config.buckets, default=1)),
        ("preferred_batch_sizes", max(config.preferred_batch_sizes, default=1)),
    ):
        if largest > 1:
            raise ConfigError(
                f"{key} is {config.changed()[key]}; expected at most 1, "
                f"since the model is not batchable: {reason}"
            )
    return 1


def _labels(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    if not isinstance(config.labels, str):
        return config.labels
    path = folder / config.labels
    try:
        if not path.resolve().is_relative_to(folder):
            raise ConfigError(f"labels is {config.labels!r}; expected a file in the model's folder")
        with path.open("rb") as file:
            raw = file.read(MAX_LABELS_BYTES + 1)
        text = raw.decode()
    except (OSError, RuntimeError, ValueError) as problem:
        raise ConfigError(
            f"labels is {config.labels!r}; expected a UTF-8 file in the model's folder ({problem})"
        ) from problem
    if len(raw) > MAX_LABELS_BYTES:
        raise ConfigError(
            f"labels is {config.labels!r}; expected a file of at most {MAX_LABELS_BYTES} bytes"
        )
    return tuple(text.splitlines())
