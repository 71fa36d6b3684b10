"""The knobs of model.toml: names, limits and defaults.

Every key has a default, so the file may be missing. `model_toml` reads the file and checks how the
knobs fit together. Each engine checks its own table (``[onnxruntime]``, ``[fake]``, …).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from inferq.shared.schema import MAX_DIMS, MAX_TENSORS
from inferq.workers.batching.padding import PadRule
from inferq.workers.models.validation import (
    MAX_BATCH_SIZE,
    MAX_SIZES,
    Flag,
    Lanes,
    Milliseconds,
    Rows,
    Text,
    TomlTable,
)

#: Most bytes that model.toml may allow a request: what msgpack can hold in one tensor.
MAX_REQUEST_BYTES: Final = (1 << 32) - 1
DEFAULT_REQUEST_BYTES: Final = 64 << 20
DEFAULT_MAX_BATCH_SIZE: Final = 32
#: Of nine digits, as folders have them.
MAX_VERSION: Final = 999_999_999
MAX_LABELS: Final = 1_000_000
#: Most profiles: each takes memory on every lane.
MAX_PROFILES: Final = 8
_DAY_MS: Final = 86_400_000


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if list(sizes) != sorted(set(sizes)):
        raise ValueError("ascending sizes, each once")
    return sizes


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each name once")
    return names


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
    # A NaN in the padding would make results NaN.
    if all(type(each) in (int, float) and each == each for each in given):  # noqa: PLR0124
        return value
    raise ValueError("a number, or a table of numbers by input")


def _from_least_to_most(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    if list(sizes) != sorted(sizes):
        raise ValueError("the smallest, the optimum and the largest size, in this order")
    return sizes


BatchAxis = Annotated[int, Field(strict=True, ge=0, lt=MAX_DIMS)]
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
    """``[pad.<symbol>]``: the sizes to which that dim is padded, and the value of the padding."""

    buckets: Annotated[
        tuple[DimSize, ...],
        Field(min_length=1, max_length=MAX_SIZES),
        AfterValidator(_ascending),
    ]
    #: For all inputs, or by input: ``value = { input_ids = 1, attention_mask = 0 }``.
    value: Annotated[Any, PlainValidator(_pad_value)] = 0


class ModelConfig(TomlTable):
    """model.toml without the engines' own tables."""

    #: Empty: the first engine that takes the file (`repository` fills it in).
    engine: str = ""
    #: The version that is served, whatever newer ones there are; 0: the newest that is whole.
    version: Annotated[int, Field(strict=True, ge=0, le=MAX_VERSION)] = 0
    #: 0: as many as suit the device.
    lanes: Lanes = 0
    #: Rows; 0: the last bucket, or else 32; 1 for a model that is not batchable.
    max_batch_size: Annotated[int, Field(strict=True, ge=0, le=MAX_BATCH_SIZE)] = 0
    #: Whether requests share batches; None: if rows were measured to be independent.
    batchable: Flag | None = None
    max_queue_delay_ms: Milliseconds = 0.0
    #: Empty: the size that warm-up measured to be best.
    preferred_batch_sizes: Sizes = ()
    #: Batch sizes at which the engine runs; smaller batches are padded. Empty: any size.
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
    #: If a batch computes for longer, the worker no longer renews its lease.
    max_run_seconds: Annotated[float, Field(strict=True, gt=0, le=7 * 86_400)] = 3600.0
    #: How often a request may end its worker before it becomes a dead letter.
    max_attempts: Annotated[int, Field(strict=True, ge=1, le=100)] = 3
    #: Priority of requests that name none; 0 is the most urgent.
    priority: Annotated[int, Field(strict=True, ge=0, le=9)] = 0
    #: Timeout of requests that name none; 0: none.
    timeout_ms: Annotated[int, Field(strict=True, ge=0, le=_DAY_MS)] = 0
    #: At most one batch in so many is audited: one of its requests runs again alone. 0: no audits.
    audit_every: Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)] = 100
    #: What happens if an audit finds that answers depend on their batch: the model runs request by
    #: request from then on, or that is only logged.
    on_mismatch: Literal["unbatch", "warn"] = "unbatch"
    #: Run every bucket once before claiming, and measure which is best.
    warm_up: Flag = True
    #: ``safe``: inputs of another dtype are cast, where the model's holds all that they hold.
    cast: Literal["none", "safe"] = "none"
    #: Input or output → the dim that its rows are, where that is not dim 0.
    batch_axis: dict[str, BatchAxis] = Field(default_factory=dict, max_length=MAX_TENSORS)
    #: The outputs that are computed and served, in this order; empty: all.
    outputs: Annotated[tuple[Text, ...], Field(max_length=MAX_TENSORS), AfterValidator(_once)] = ()
    #: The names of the outputs' classes: a list, or a file in the model's folder with one a line.
    labels: Labels = ()
    pad: dict[str, PadTable] = Field(default_factory=dict, max_length=64)
    #: How a lane waits for its card: asleep, or asking it in a loop, which takes a core and saves
    #: the time that it takes to wake up.
    gpu_wait: Literal["sleep", "spin"] = "sleep"
    #: Symbol → its smallest, optimum and largest size: what TensorRT builds for; ``[profile]``, or
    #: several of them, ``[[profile]]``. For symbols that a profile leaves out, the batch knobs and
    #: `pad` are used (`ranges`).
    profile: Profiles = ()

    @property
    def default_max_batch_size(self) -> int:
        """max_batch_size of a batchable model whose model.toml does not say it."""
        return self.buckets[-1] if self.buckets else DEFAULT_MAX_BATCH_SIZE

    @property
    def known_sizes(self) -> dict[str, int]:
        """Symbol → a size that it may have: the optimum of the first profile, or a padded one."""
        padded = {symbol: table.buckets[0] for symbol, table in self.pad.items()}
        optimum = {name: sizes[1] for table in self.profile[:1] for name, sizes in table.items()}
        return padded | optimum

    def changed(self) -> dict[str, Any]:
        """The knobs, other than the engine, that differ from their defaults."""
        return self.model_dump(exclude_defaults=True, exclude={"engine"})
