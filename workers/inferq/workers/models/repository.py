"""The model repository: ``models/<name>/model.toml`` and ``models/<name>/<version>/model.onnx``.

Versions are whole numbers; the highest version whose files are all there and complete is served. If
an engine refuses such a version, no older one is served in its place: a wrong model would go
unnoticed. A model is as dangerous as code: nothing outside of the repository is read (symbolic
links included). Files that anybody may write cause a warning; they are not refused, since some
container mounts make every file so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.names import is_model_name
from inferq.workers.logs.fields import about
from inferq.workers.logs.slow import warn_if_slow
from inferq.workers.models.batch_layout import filled, fixed_batch, rows_first
from inferq.workers.models.chosen_outputs import choose
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.folders import TOML, inside, look_through, versions_of, why_no_name
from inferq.workers.models.model_toml import ModelToml, check_pad, check_profile, read_toml
from inferq.workers.models.not_served import NotServed, not_served
from inferq.workers.models.signatures import Declared, Examined, examine
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import naming
from inferq.workers.models.version_choice import newest_whole

logger = logging.getLogger(__name__)

MAX_LABELS_BYTES: Final = 16 << 20


def model_names(root: Path) -> list[str]:
    """The names of the models' folders in `root`, sorted. ConfigError if `root` is no folder.

    Names are not checked: `load_model` does that.
    """
    return list(look_through(root).models)


def load_models(
    root: Path, names: Iterable[str], *, on_cpu: bool = False
) -> tuple[list[ModelSpec], list[NotServed]]:
    """The models out of `names` that can be served, and why the others cannot.

    Versions that were passed over are not among these: each ModelSpec has its own.
    """
    specs: list[ModelSpec] = []
    bad: list[NotServed] = []
    for name in names:
        try:
            with warn_if_slow(logger, name, "reading it and running examples"):
                specs.append(load_model(root, name, on_cpu=on_cpu))
        except ConfigError as problem:
            bad.append(not_served(name, problem.message))
        except OSError as problem:
            bad.append(not_served(name, f"{root / name} cannot be read: {problem}"))
        except Exception as problem:
            # Whatever a library raises about one model's files affects only that model.
            logger.exception("model %r could not be read", name, extra=about(model=name))
            bad.append(not_served(name, f"it could not be read: {problem!r}"))
    return specs, bad


def load_model(root: Path, name: str, *, on_cpu: bool = False) -> ModelSpec:
    """The model `name` in the repository `root`. ConfigError naming file, value, expectation.

    `on_cpu`: as it is served without a GPU, whatever its model.toml says.
    """
    if not is_model_name(name):
        raise ConfigError(why_no_name(name))
    if not root.is_dir():
        raise ConfigError(f"model repository is {str(root)!r}; expected a folder")
    folder = inside(root, root / name)
    if not folder.is_dir():
        raise ConfigError(f"model {name!r}: no folder {str(root / name)!r} in the repository")
    toml_path = root / name / TOML
    toml = ModelToml(ModelConfig(), {})
    if toml_path.exists() or toml_path.is_symlink():
        with naming(toml_path):
            toml = read_toml(inside(root, toml_path))
    # An engine that needs no file needs no version's folder either.
    versions = versions_of(folder) or (1,)
    served = _pinned(toml_path, toml.config, versions)
    chosen, passed_over = newest_whole(root, name, served, toml, on_cpu=on_cpu)
    path, table = chosen.path, chosen.table
    with naming(toml_path if path is None else path, tables=toml_path):
        declared = chosen.cls.read(path, table)
    with naming(toml_path):
        declared = choose(declared, toml.config.outputs)
    config = toml.config.model_copy(update={"engine": chosen.engine})
    with naming(toml_path):
        examined, config = _examined(declared, config, any_layout=chosen.cls.any_layout)
        signature = examined.signature
        check_pad(config.pad, signature)
        check_profile(config.profile, signature)
        return ModelSpec(
            name=name,
            version=chosen.version,
            versions=versions,
            path=path,
            config=config,
            engine_table=table,
            signature=signature,
            max_batch_size=_max_batch_size(config, examined.why_not_batchable),
            labels=_labels(folder, config) or declared.labels,
            why_not_batchable=examined.why_not_batchable,
            remark=examined.remark,
            passed_over=tuple(passed_over),
        )


def _examined(
    declared: Declared, config: ModelConfig, *, any_layout: bool
) -> tuple[Examined, ModelConfig]:
    """What the model is served by, with rows in dim 0; a batch of fixed size is its only bucket."""
    if config.batch_axis and not any_layout:
        raise ConfigError(
            f"batch_axis is {config.batch_axis}; expected none: engine {config.engine!r} takes "
            "rows in dim 0"
        )
    declared = rows_first(declared, config.batch_axis)
    size = fixed_batch(declared.signature) if any_layout and config.batchable is not False else 0
    if size:
        examined = examine(filled(declared, size), config.batchable, config.known_sizes)
        if examined.why_not_batchable is None:
            return examined, _of_one_size(config, size)
        why = f"dim 0 of its inputs is fixed at {size}, and {examined.why_not_batchable}"
        return Examined(declared.signature, why), config
    return examine(declared, config.batchable, config.known_sizes), config


def _of_one_size(config: ModelConfig, size: int) -> ModelConfig:
    if config.buckets not in ((), (size,)):
        raise ConfigError(
            f"buckets is {list(config.buckets)}; expected none, since the batch is fixed at {size}"
        )
    if config.max_batch_size > size:
        raise ConfigError(
            f"max_batch_size is {config.max_batch_size}; expected at most {size}, at which the "
            "model's batch is fixed"
        )
    return config.model_copy(update={"buckets": (size,)})


def _pinned(path: Path, config: ModelConfig, versions: tuple[int, ...]) -> tuple[int, ...]:
    """The versions that may be served. ConfigError: that which model.toml names is not there."""
    if not config.version:
        return versions
    if config.version not in versions:
        raise ConfigError(
            f"{path}: version is {config.version}; expected one of {', '.join(map(str, versions))}"
        )
    return (config.version,)


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
