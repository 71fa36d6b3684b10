"""An engine without a model: it gives back its inputs, after a delay, or fails as it is asked to.

For tests, benchmarks and users' own tests. It is configured by its table of model.toml alone::

    engine = "fake"
    lanes = 2                        # default 1
    [fake]
    inputs = [{ name = "x", dtype = "float32", shape = ["batch", 768] }]
    delay_ms = 5.0                   # a batch
    delay_ms_per_row = 0.1
    faults = true                    # the first element of a request's first input may be a fault

A delay sleeps with the GIL released, as a GPU's stream would. Outputs may be views of the inputs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from inferq.shared.errors import ConfigError, FatalEngineError
from inferq.shared.schema import DTYPES, MAX_DIMS, MAX_TENSORS, Array, Signature, TensorSpec
from inferq.workers.models.engine import Batch, Engine, Lane, LoadedModel, check_inputs, gather
from inferq.workers.models.ranges import given_optimum_inputs
from inferq.workers.models.signatures import Declared
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import Flag, Milliseconds, Text, TomlTable, validate

#: With ``faults = true``, what the first element of a request's first input makes of its batch.
FAULT_RAISE: Final = -1
"""The batch raises ValueError."""
FAULT_EXIT: Final = -2
"""The process ends at once, with `EXIT_STATUS`."""
FAULT_SEGFAULT: Final = -3
"""The process gets SIGSEGV."""
FAULT_FATAL: Final = -4
"""The batch raises FatalEngineError: the engine is beyond use."""
FAULT_TOO_FEW_ROWS: Final = -5
"""The batch's outputs have one row too few."""
FAULT_HANG: Final = -6
"""The batch does not end for `HANG_S` seconds."""

FAULTS: Final = frozenset(range(FAULT_HANG, FAULT_RAISE + 1))
EXIT_STATUS: Final = 70
HANG_S: Final = 3600.0


def _dim(value: object) -> object:
    is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_size and not (isinstance(value, str) and value):
        raise ValueError("a size of at least 1, or a symbol")
    return value


Dim = Annotated[int | str, BeforeValidator(_dim)]


class _Tensor(TomlTable):
    name: Text
    dtype: Literal[
        "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
        "float16", "float32", "float64", "complex64", "complex128", "string", "bytes",
    ]  # fmt: skip
    shape: Annotated[tuple[Dim, ...], Field(max_length=MAX_DIMS)]


class _Table(TomlTable):
    """``[fake]``."""

    inputs: Annotated[tuple[_Tensor, ...], Field(min_length=1, max_length=MAX_TENSORS)]
    delay_ms: Milliseconds = 0.0
    delay_ms_per_row: Milliseconds = 0.0
    faults: Flag = False


def _read(table: Mapping[str, Any]) -> _Table:
    read = validate(_Table, table, "fake.")
    names = [tensor.name for tensor in read.inputs]
    if len(set(names)) < len(names):
        raise ConfigError(f"fake.inputs have the names {names}; expected each once")
    if read.faults and DTYPES[read.inputs[0].dtype].kind not in "if":
        raise ConfigError(
            f"fake.inputs.0.dtype is {read.inputs[0].dtype!r}; expected a signed integer or float, "
            "since fake.faults = true reads negative numbers from it"
        )
    return read


class FakeEngine(Engine):
    """Gives back its inputs."""

    name = "fake"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = _read(spec.engine_table)

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        """What ``[fake]`` says; the outputs are named and shaped as the inputs."""
        specs = tuple(TensorSpec(t.name, t.dtype, t.shape) for t in _read(table).inputs)
        return Declared(Signature(specs, specs))

    def load(self) -> LoadedModel:
        spec = self.spec
        return LoadedModel(
            spec,
            "cpu",
            [FakeLane(self._table) for _ in range(spec.config.lanes or 1)],
            buckets=spec.config.buckets,
            optimum=given_optimum_inputs(spec),
        )


class FakeLane(Lane):
    """Sleeps, then echoes."""

    def __init__(self, table: _Table) -> None:
        self._table = table
        self._first = table.inputs[0].name
        self._dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in table.inputs}

    def run(self, batch: Batch) -> Mapping[str, Array]:
        table = self._table
        arrays = gather(batch)
        check_inputs(arrays, self._dtypes)
        delay_ms = table.delay_ms + table.delay_ms_per_row * batch.bucket
        if delay_ms:
            time.sleep(delay_ms / 1000)
        rows = batch.rows
        if table.faults:
            fault = next((f for part in batch.parts if (f := self._fault(part)) is not None), None)
            if fault is not None:
                rows -= _commit(fault)
        if batch.batchable and rows != batch.bucket:
            return {name: array[:rows] for name, array in arrays.items()}
        return arrays

    def _fault(self, part: Mapping[str, Array]) -> int | None:
        array = part[self._first]
        value = float(array.flat[0]) if array.size else 0.0
        return int(value) if value in FAULTS else None


def _commit(fault: int) -> int:
    """Fail as asked; returns how many rows to keep back."""
    if fault == FAULT_RAISE:
        raise ValueError("the fake engine was asked to raise")
    if fault == FAULT_EXIT:
        os._exit(EXIT_STATUS)
    if fault == FAULT_SEGFAULT:
        signal.raise_signal(signal.SIGSEGV)  # to this thread: it gets no further
    if fault == FAULT_FATAL:
        raise FatalEngineError("the fake engine was asked to be beyond use")
    if fault == FAULT_HANG:
        time.sleep(HANG_S)
    return int(fault == FAULT_TOO_FEW_ROWS)
