"""The knobs of model.toml: names, limits and defaults, and how they must fit together.

Every key has a default, so the file may be missing. The table of each engine (``[onnxruntime]``,
``[fake]``, …) is checked by that engine.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Signature
from inferq.workers.batching.padding import PadRule
from inferq.workers.models.registry import ENGINES
from inferq.workers.models.signatures import how_to_name
from inferq.workers.models.validation import (
    MAX_BATCH_SIZE,
    MAX_SIZES,
    Flag,
    Lanes,
    Milliseconds,
    Rows,
    TomlTable,
    nearest,
    validate,
)

MAX_TOML_BYTES: Final = 1 << 20
#: Most bytes that model.toml may allow a request: what msgpack can hold in one tensor.
MAX_REQUEST_BYTES: Final = (1 << 32) - 1
DEFAULT_REQUEST_BYTES: Final = 64 << 20
DEFAULT_MAX_BATCH_SIZE: Final = 32
MAX_LABELS: Final = 1_000_000
#: Each costs memory on every lane.
MAX_PROFILES: Final = 8
#: Reading a dotted key takes time by the square of its parts.
MAX_KEY_PARTS: Final = 100
_LONG_KEY: Final = re.compile(rb"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){%d}""" % MAX_KEY_PARTS)
_DAY_MS: Final = 86_400_000


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if list(sizes) != sorted(set(sizes)):
        raise ValueError("ascending sizes, each once")
    return sizes


def _names(labels: object) -> object:
    is_file = isinstance(labels, str) and labels
    if not is_file and not (
        isinstance(labels, list)
        and len(labels) <= MAX_LABELS
        and all(isinstance(label, str) for label in labels)
    ):
        raise ValueError(f"a list of at most {MAX_LABELS} names, or a file's name")
    return labels


def _tables(profile: object) -> object:
    return [profile] if isinstance(profile, dict) else profile


def _pad_value(value: object) -> object:
    given = list(value.values()) if isinstance(value, dict) else [value]
    # Not-a-number would spread over whatever it meets.
    if all(type(each) in (int, float) and each == each for each in given):  # noqa: PLR0124
        return value
    raise ValueError("a number, or a table of numbers by input")


def _from_least_to_most(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    if list(sizes) != sorted(sizes):
        raise ValueError("the smallest, the usual and the largest size, in this order")
    return sizes


#: Of a dim other than the batch.
DimSize = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Sizes = Annotated[tuple[Rows, ...], Field(max_length=MAX_SIZES), AfterValidator(_ascending)]
ProfileSizes = Annotated[tuple[DimSize, DimSize, DimSize], AfterValidator(_from_least_to_most)]
Profiles = Annotated[
    tuple[Annotated[dict[str, ProfileSizes], Field(max_length=64)], ...],
    Field(max_length=MAX_PROFILES),
    BeforeValidator(_tables),
]
Labels = Annotated[tuple[str, ...] | str, BeforeValidator(_names)]


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PadTable(PadRule):
    """``[pad.<symbol>]``: the sizes to which that dim is padded, and what stands in the padding."""

    buckets: Annotated[
        tuple[DimSize, ...],
        Field(min_length=1, max_length=MAX_SIZES),
        AfterValidator(_ascending),
    ]
    #: Of all inputs, or by input: ``value = { input_ids = 1, attention_mask = 0 }``.
    value: Annotated[Any, PlainValidator(_pad_value)] = 0


class ModelConfig(TomlTable):
    """model.toml without the engines' own tables."""

    #: Empty: the first engine that takes the file found (`repository` fills it in).
    engine: str = ""
    #: 0: as many as suit the device.
    lanes: Lanes = 0
    #: Rows; 0: the last bucket, or else 32; 1 for a model that is not batchable.
    max_batch_size: Annotated[int, Field(strict=True, ge=0, le=MAX_BATCH_SIZE)] = 0
    #: Whether requests share batches; None: if rows were measured to be independent.
    batchable: Flag | None = None
    max_queue_delay_ms: Milliseconds = 0.0
    #: Empty: the size that warm-up measured to be best.
    preferred_batch_sizes: Sizes = ()
    #: Batch sizes that the engine runs at; smaller batches are padded. Empty: any.
    buckets: Sizes = ()
    #: Requests that may wait in the queue; 0: no limit.
    max_queue_depth: Annotated[int, Field(strict=True, ge=0, le=1 << 40)] = 100_000
    #: Bytes that may wait in the queue, as a client estimates them: its depth times the mean size
    #: of that client's requests; 0: no limit.
    max_queue_bytes: Annotated[int, Field(strict=True, ge=0, le=1 << 50)] = 4 << 30
    #: Bytes of one request's inputs.
    max_request_bytes: Annotated[int, Field(strict=True, ge=1, le=MAX_REQUEST_BYTES)] = (
        DEFAULT_REQUEST_BYTES
    )
    #: A batch that computes for longer costs the worker its lease.
    max_run_seconds: Annotated[float, Field(strict=True, gt=0, le=7 * 86_400)] = 3600.0
    #: How often a request may kill its worker before it is dead-lettered.
    max_attempts: Annotated[int, Field(strict=True, ge=1, le=100)] = 3
    #: Of requests that name none; 0 is the most urgent.
    priority: Annotated[int, Field(strict=True, ge=0, le=9)] = 0
    #: Of requests that name none; 0: none.
    timeout_ms: Annotated[int, Field(strict=True, ge=0, le=_DAY_MS)] = 0
    #: At most one batch in so many is audited: one of its requests runs again alone; 0: none is.
    audit_every: Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)] = 100
    #: What becomes of a model whose answers were found to depend on their batch: it runs request by
    #: request from then on, or is only told of.
    on_mismatch: Literal["unbatch", "warn"] = "unbatch"
    #: Run every bucket once before claiming, and measure which is best.
    warm_up: Flag = True
    #: What the outputs' classes are called: a list, or a file in the model's folder, one a line.
    labels: Labels = ()
    pad: dict[str, PadTable] = Field(default_factory=dict, max_length=64)
    #: Symbol → its smallest, usual and largest size: what TensorRT builds for; ``[profile]``, or
    #: several of them, ``[[profile]]``. Where one is silent the batch knobs and `pad` say it
    #: (`ranges`).
    profile: Profiles = ()

    @property
    def default_max_batch_size(self) -> int:
        """Rows, for a batchable model whose model.toml does not say."""
        return self.buckets[-1] if self.buckets else DEFAULT_MAX_BATCH_SIZE

    @property
    def known_sizes(self) -> dict[str, int]:
        """Symbol → a size that it may have: the usual one of the first profile, or a padded one."""
        padded = {symbol: table.buckets[0] for symbol, table in self.pad.items()}
        usual = {symbol: sizes[1] for table in self.profile[:1] for symbol, sizes in table.items()}
        return padded | usual

    def changed(self) -> dict[str, Any]:
        """The knobs, other than the engine, that differ from their defaults."""
        return self.model_dump(exclude_defaults=True, exclude={"engine"})


@dataclass(frozen=True)
class ModelToml:
    """A model.toml as read: the knobs, and each engine's own table as it stands."""

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
        # Beside TOMLDecodeError: no UTF-8, numbers longer than Python reads.
        raise ConfigError(f"not TOML: {problem}") from problem
    knobs: dict[str, Any] = {}
    tables: dict[str, Mapping[str, Any]] = {}
    known = {*ModelConfig.model_fields, *ENGINES}
    for key, value in document.items():
        if key not in known:
            raise ConfigError(f"{key} is not a known key; {nearest(key, known)}")
        if key not in ENGINES:
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
        # As it stands there, not as the first of several.
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

    And unless its values are of inputs that have it, whose dtypes can hold them.
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
    """What `dtype` can hold, unless that is `value`, too."""
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
