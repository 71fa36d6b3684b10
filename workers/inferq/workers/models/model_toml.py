"""Reads model.toml, and checks how its knobs fit together and fit the model's signature."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Signature, is_text
from inferq.workers.batching.padding import PadRule
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.registry import engines
from inferq.workers.models.signatures import how_to_name
from inferq.workers.models.validation import nearest, validate

MAX_TOML_BYTES: Final = 1 << 20
#: Reading a dotted key takes time by the square of its parts.
MAX_KEY_PARTS: Final = 100
_LONG_KEY: Final = re.compile(rb"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){%d}""" % MAX_KEY_PARTS)


@dataclass(frozen=True)
class ModelToml:
    """A model.toml as read: the knobs, and each engine's own table, unchecked."""

    config: ModelConfig
    tables: Mapping[str, Mapping[str, Any]]


def read_toml(path: Path) -> ModelToml:
    """Read model.toml at `path`. ConfigError naming key, value and expectation."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TOML_BYTES + 1)
    except OSError as problem:
        raise ConfigError(f"cannot be read: {problem.strerror or problem}") from problem
    if len(raw) > MAX_TOML_BYTES:
        raise ConfigError(f"more than {MAX_TOML_BYTES} bytes; expected at most that")
    if _LONG_KEY.search(raw):
        raise ConfigError(f"not TOML that is read: a key of {MAX_KEY_PARTS} parts or more")
    try:
        document = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as problem:
        # TOMLDecodeError, bytes that are no UTF-8, numbers too long for Python.
        raise ConfigError(f"not TOML: {problem}") from problem
    knobs: dict[str, Any] = {}
    tables: dict[str, Mapping[str, Any]] = {}
    tables_of = engines()
    known = {*ModelConfig.model_fields, *tables_of}
    for key, value in document.items():
        if key not in known:
            raise ConfigError(f"{key} is not a known key; {nearest(key, known)}")
        if key not in tables_of:
            knobs[key] = value
        elif isinstance(value, dict):
            tables[key] = value
        else:
            raise ConfigError(f"{key} is {value!r}; expected a table, [{key}]")
    config = _validated(knobs)
    _check_sizes(config)
    return ModelToml(config, tables)


def _validated(knobs: Mapping[str, Any]) -> ModelConfig:
    try:
        return validate(ModelConfig, knobs)
    except ConfigError as problem:
        if not isinstance(knobs.get("profile"), dict):
            raise
        # The file has one table, so name it without an index.
        raise ConfigError(problem.message.replace("profile.0", "profile")) from None


def _check_sizes(config: ModelConfig) -> None:
    limit = config.max_batch_size or config.default_max_batch_size
    if config.buckets and config.buckets[-1] < limit:
        raise ConfigError(
            f"buckets is {list(config.buckets)}; expected the last to be at least "
            f"max_batch_size, {limit}"
        )
    if config.preferred_batch_sizes and config.preferred_batch_sizes[-1] > limit:
        raise ConfigError(
            f"preferred_batch_sizes is {list(config.preferred_batch_sizes)}; expected none above "
            f"max_batch_size, {limit}"
        )


def check_pad(pad: Mapping[str, PadRule], signature: Signature) -> None:
    """ConfigError unless each padded symbol is a dim of an input, and never its dim 0.

    Also unless its values are for inputs with that dim, and fit their dtypes.
    """
    firsts = {spec.shape[0] for spec in signature.inputs if spec.shape}
    inner = {dim for spec in signature.inputs for dim in spec.shape[1:] if isinstance(dim, str)}
    for symbol in pad:
        if symbol not in inner or symbol in firsts:
            expected = ", ".join(sorted(inner - firsts)) or "none: this model has no such dim"
            raise ConfigError(
                f"pad.{symbol} names no dim that can be padded; expected a symbol of an input "
                f"other than its first dim ({expected}){_nameless(signature)}"
            )
        _check_values(symbol, pad[symbol], signature)


def _check_values(symbol: str, rule: PadRule, signature: Signature) -> None:
    having = {spec.name: spec.dtype for spec in signature.inputs if symbol in spec.shape[1:]}
    named = rule.value if isinstance(rule.value, Mapping) else {}
    for name in named:
        if name not in having:
            raise ConfigError(
                f"pad.{symbol}.value names {name!r}; expected inputs that have the dim {symbol} "
                f"({', '.join(sorted(having))})"
            )
    for name, dtype in having.items():
        if is_text(dtype):
            if name in named:
                raise ConfigError(
                    f"pad.{symbol}.value.{name} is {named[name]}; expected none, since input "
                    f"{name!r} is {dtype}, and is padded with empty ones"
                )
            continue
        value = rule.value_in(name)
        expected = _not_held(value, np.dtype(dtype))
        if expected is None:
            continue
        where = f"pad.{symbol}.value{'.' + name if named else ''}"
        by_input = ""
        if not named and len(having) > 1:
            by_input = ", or a table of them by input: value = { " + f"{name} = … }}"
        raise ConfigError(
            f"{where} is {value}; expected {expected}, since input {name!r} is {dtype}{by_input}"
        )


def _not_held(value: float, dtype: np.dtype[Any]) -> str | None:
    """What `dtype` can hold, if it cannot hold `value`; else None."""
    if dtype.kind == "b":
        return None if value in (0, 1) else "0 or 1"
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        held = math.isfinite(value) and value == int(value) and info.min <= value <= info.max
        return None if held else f"a whole number from {info.min} to {info.max}"
    most = float(np.finfo(dtype).max)
    held = math.isinf(value) or -most <= value <= most
    return None if held else f"a number from {-most:.6g} to {most:.6g}, inf or -inf"


def _nameless(signature: Signature) -> str:
    """What to do about the first inner dim without a name, if there is one."""
    for spec in signature.inputs:
        if None in spec.shape[1:]:
            return "; " + how_to_name(spec.name, spec.shape.index(None, 1))
    return ""


def check_profile(profiles: Collection[Collection[str]], signature: Signature) -> None:
    """ConfigError unless each symbol of each profile is a dim of an input."""
    known = {dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str)}
    for symbol in (symbol for profile in profiles for symbol in profile):
        if symbol not in known:
            expected = ", ".join(sorted(known)) or "none: no dim of this model has a name"
            raise ConfigError(
                f"profile.{symbol} names no dim; expected a symbol of an input ({expected})"
                f"{_nameless(signature)}"
            )
