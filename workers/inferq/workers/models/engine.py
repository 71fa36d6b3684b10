"""What an engine is: it loads one model; what it loaded runs batches on lanes.

Lifecycle, the same for every backend: ``Engine.load → LoadedModel.lanes[n].run … →
LoadedModel.close``. A lane is what one batch occupies: on CUDA one execution context, one stream
and its buffers; on a CPU one core. Each lane is driven by one thread of its own that calls
`Lane.run` and nothing else touches it, so copies and compute of different lanes overlap while
``run`` itself may simply wait, provided that it waits with the GIL released.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol

import numpy as np

from inferq.shared.errors import EngineError, RequestError
from inferq.shared.schema import Array, GpuTimes, Tensors
from inferq.workers.models.joining import copy, join
from inferq.workers.models.ranges import Optimum
from inferq.workers.models.signatures import Declared
from inferq.workers.models.spec import ModelSpec

#: Libraries' messages can hold whole shapes and stack traces.
MAX_REASON_CHARS: Final = 500


@dataclass
class Batch:
    """Compatible requests' inputs, to be run as one.

    `parts` holds one mapping of input name → array per request, in order. Along dim 0 they are
    joined; all other dims are equal already. `rows` is the sum of their leading dims and `bucket`
    (≥ rows) the batch size to run: rows beyond `rows` are padding. For a model that is not
    batchable there is one part, rows = bucket = 1, and its arrays pass as they are.
    """

    parts: Sequence[Tensors]
    rows: int
    bucket: int
    batchable: bool = True
    #: Inputs without rows, as they are: the same of all the requests.
    shared: Tensors = field(default_factory=dict)
    #: The names of the outputs that are wanted; None: all. An engine that computes all gives all.
    outputs: Sequence[str] | None = None
    #: What it took to put the inputs together, in ms, once that is done.
    gather_ms: float = 0.0
    #: Row → the error that its request is answered by, once it has run; its outputs mean nothing,
    #: and there are none if all rows have one.
    errors: Mapping[int, RequestError] | None = None


class OutOfDeviceMemory(EngineError):
    """The device's memory does not suffice for this batch."""


class PerhapsNoMemory(EngineError):
    """What failed may have lacked memory. Of a request it is its own fault, at warm-up the size's.

    One request that takes all memory must not make the batches of all others smaller.
    """


class RowsDiffer(EngineError):
    """An output has another number of rows than the inputs that were run."""


class Lane(Protocol):
    """Where one batch at a time runs."""

    #: Of its last run; None where there is no card to tell.
    gpu_times: GpuTimes | None = None

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Output name → array with `batch.rows` rows (padding cut off).

        The arrays belong to the caller: the lane does not write to them again. Raises EngineError
        for what this batch caused, FatalEngineError if no further batch can run. Any other
        exception is taken for an EngineError by the caller.
        """
        ...


class FurtherLane(Lane, Protocol):
    """One that is opened while the model warms up, and closed again if nothing is gained by it."""

    def close(self) -> None:
        """Free it. Nothing of it is running. Idempotent."""
        ...


def _nothing() -> None:
    """Nothing is to be done."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its lanes open. Close it once no lane runs."""

    spec: ModelSpec
    device: Literal["cpu", "cuda"]
    #: Open, at least one.
    lanes: Sequence[Lane]
    #: Batch sizes at which it runs, ascending; empty: any.
    buckets: tuple[int, ...] = ()
    #: Its optimum inputs, those of the largest batches first; empty: nothing tells them.
    optimum: Sequence[Optimum] = ()
    #: Whether each lane has hardware of its own (CPU cores), so that two batches on two lanes end
    #: sooner than one of twice the size on one.
    parallel_lanes: bool = False
    #: How many times as much as on a CPU two runs of other shapes may differ by rounding: a card
    #: multiplies float32 as TF32, whose mantissa is float16's.
    rounding: float = 1.0
    #: How often a lane runs a size until the next run is as fast as any. Beyond 1 it does so while
    #: no other lane runs.
    runs_to_be_warm: int = 1
    #: Each opens one lane more, which `free` frees, too, if it was not closed. Warm-up asks them,
    #: the first one first, as long as another lane makes the model faster. Whatever they raise but
    #: FatalEngineError says that it does not fit.
    further_lanes: Sequence[Callable[[], FurtherLane]] = ()
    #: Called once all sizes have run, before requests come: what was compiled can be kept.
    warmed_up: Callable[[], None] = _nothing
    #: Frees all that the last reference does not free. Idempotent.
    free: Callable[[], None] = _nothing

    def close(self) -> None:
        """Free everything. No lane is running by then. Idempotent."""
        self.free()


class Engine(ABC):
    """Loads one model. The constructor checks the engine's own table; `load` reads the model."""

    #: The name in model.toml.
    name: str
    #: Whether its lanes take each input as it stands in the file, whatever dim its rows are, and
    #: however many: what `batch_axis` and a batch of fixed size need.
    any_layout: ClassVar[bool] = False

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    @classmethod
    @abstractmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        """What the model's file says, without loading it to a device. ConfigError: why not."""

    @abstractmethod
    def load(self) -> LoadedModel:
        """Load the model and open its lanes. ConfigError if it cannot be; nothing is left open."""


def answers(lane: Lane, batch: Batch) -> Mapping[str, Array]:
    """What `lane` answers to all of `batch`; raises the error that one of its rows has."""
    outputs = lane.run(batch)
    for error in (batch.errors or {}).values():
        raise error
    return outputs


def gather(batch: Batch) -> dict[str, Array]:
    """The batch's inputs joined along dim 0 and padded with copies of the last row to `bucket`.

    Without copying where one part needs no padding. What is shared is among them.
    """
    first = batch.parts[0]
    if len(batch.parts) == 1 and batch.bucket == batch.rows:
        return {**first, **batch.shared}
    joined: dict[str, Array] = {
        name: np.empty((batch.bucket, *array.shape[1:]), array.dtype)
        for name, array in first.items()
    }
    gather_into(batch, joined)
    joined.update(batch.shared)
    return joined


def gather_into(batch: Batch, into: Mapping[str, Array]) -> None:
    """The same into arrays of `bucket` rows; one part's as it is if the model is not batchable.

    ValueError, TypeError: it has another shape or dtype than they have.
    """
    began = time.perf_counter()
    for name, rows in into.items():
        if batch.batchable:
            join([part[name] for part in batch.parts], rows)
        else:
            copy(batch.parts[0][name], rows)
    batch.gather_ms = (time.perf_counter() - began) * 1000


def check_inputs(inputs: Tensors, dtypes: Mapping[str, np.dtype[Any]]) -> None:
    """EngineError unless `inputs` are those of `dtypes` (name → dtype), no more and no fewer.

    For engines whose library would take others without a word.
    """
    if inputs.keys() != dtypes.keys():
        raise EngineError(f"inputs are {sorted(inputs)}; expected {sorted(dtypes)}")
    for name, array in inputs.items():
        if array.dtype != dtypes[name]:
            raise EngineError(f"input {name!r} is {array.dtype.name}; expected {dtypes[name].name}")


def without_padding(batch: Batch, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """`outputs` of a run of `gather(batch)`, cut to the batch's rows where it was padded.

    RowsDiffer for an output of another number of rows than was run.
    """
    if not batch.batchable or batch.bucket == batch.rows:
        return outputs
    # Counted before the padding is cut, or rows that are missing would go unseen.
    check_rows(outputs, batch.bucket)
    return {name: array[: batch.rows] for name, array in outputs.items()}


def check_rows(outputs: Mapping[str, Array], rows: int) -> None:
    """RowsDiffer unless each output has as many `rows` as the inputs."""
    for name, array in outputs.items():
        got = array.shape[0] if array.ndim else "no"
        if got != rows:
            raise RowsDiffer(f"output {name!r} has {got} rows; expected {rows}, as the inputs")


def reason(problem: BaseException) -> str:
    """What a library says of `problem`, on one line of at most `MAX_REASON_CHARS` (and "…")."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + "…"
