"""One model of the repository as it was read and checked; an engine loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from inferq.shared.schema import ModelAdvert, Signature, TensorSpec
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.not_served import NotServed

#: Characters of all labels of a model, up to which its advert has them.
MAX_LABEL_CHARS: Final = 64 * 1024


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
    #: Rows are in dim 0 of all that has any: `told` is as the file has them.
    signature: Signature
    #: Rows; 1 if the model is not batchable.
    max_batch_size: int
    labels: tuple[str, ...]
    #: Why the model runs request by request; None if requests share batches.
    why_not_batchable: str | None = None
    #: A remark about its rows for the operator.
    remark: str | None = None
    #: Newer versions whose files are incomplete, the newest first.
    passed_over: tuple[NotServed, ...] = ()

    @property
    def batchable(self) -> bool:
        return self.why_not_batchable is None

    @property
    def told(self) -> Signature:
        """The signature as callers know it."""
        axes = self.config.batch_axis
        if not axes:
            return self.signature
        inputs, outputs = (
            tuple(_in_file(spec, axes.get(spec.name, 0)) for spec in specs)
            for specs in (self.signature.inputs, self.signature.outputs)
        )
        return msgspec.structs.replace(self.signature, inputs=inputs, outputs=outputs)

    @property
    def batch_symbol(self) -> str | None:
        """The signature's symbol of the batch; None if the model is not batchable."""
        return self.signature.batch_symbol if self.batchable else None

    def advert(self, seconds_per_row: float, result_expires_s: int) -> ModelAdvert:
        """What a worker that serves this model announces."""
        config = self.config
        return ModelAdvert(
            name=self.name,
            version=self.version,
            engine=config.engine,
            signature=self.told,
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
            casts=config.cast == "safe",
            labels=self.labels if self.tells_labels else (),
        )

    @property
    def tells_labels(self) -> bool:
        """Whether clients are told of the labels: they ask for the advert again and again."""
        return sum(len(label) + 5 for label in self.labels) <= MAX_LABEL_CHARS


def _in_file(spec: TensorSpec, axis: int) -> TensorSpec:
    """`spec`, whose rows are in dim 0, with them in dim `axis`."""
    if not axis:
        return spec
    rows, *dims = spec.shape
    return TensorSpec(spec.name, spec.dtype, (*dims[:axis], rows, *dims[axis:]), axis)
