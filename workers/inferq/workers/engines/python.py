"""Runs user code: the class of ``model.py``, one process a lane.

    engine = "python"
    [python]
    device = "auto"                  # "cpu", "cuda"; auto: the GPU of the worker, if it has one
    isolation = "process"            # "thread": in the worker, for code that releases the GIL
    timeout_s = 60.0                 # one batch; then its process is ended
    load_timeout_s = 600.0
    [python.config]                  # whatever the class wants: context.config

What the class declares is what is served: its rows are not tried, since `read` does not load it.
Audits look at them in service.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import Field

from inferq.shared.errors import ConfigError
from inferq.shared.schema import MAX_TENSORS
from inferq.workers.cuda.gpus import VISIBLE
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.on_gpu import ROUNDING
from inferq.workers.models.engine import Engine, LoadedModel
from inferq.workers.models.ranges import given_optimum_inputs
from inferq.workers.models.signatures import Declared
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import TableError, TomlTable, validate
from inferq.workers.user_code.describe import describe
from inferq.workers.user_code.lane import close_lanes, open_lanes
from inferq.workers.user_code.plan import Plan
from inferq.workers.user_code.tensors import ALIGN
from inferq.workers.user_code.thread_lane import open_thread_lanes

#: Each lane has the model's weights in memory once more.
MAX_CPU_LANES: Final = 4
GPU_LANES: Final = 1
#: Tensors of a batch, whatever model.toml allows a request.
MAX_BATCH_BYTES: Final = 1 << 35
#: What NumPy's and PyTorch's libraries ask for how many threads to use.
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_DEFAULT_TIMEOUT_S: Final = 60.0
#: A batch whose process is ended is halved until one request is left: within max_run_seconds.
_RUNS: Final = 10

Seconds = Annotated[float, Field(strict=True, gt=0, le=7 * 86_400)]


class _Table(TomlTable):
    """``[python]``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    isolation: Literal["process", "thread"] = "process"
    #: None: 60 s, or a tenth of max_run_seconds if that is less.
    timeout_s: Seconds | None = None
    load_timeout_s: Seconds = 600.0
    config: dict[str, Any] = Field(default_factory=dict)


class PythonEngine(Engine):
    """Opens the processes of one model."""

    name = "python"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = _read(spec.engine_table)
        self._timeout_s = self._checked_timeout()

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        _read(table)
        return Declared(describe(_file(path)))

    def load(self) -> LoadedModel:
        spec, table = self.spec, self._table
        on_cuda = self._is_on_cuda()
        count = spec.config.lanes or (GPU_LANES if on_cuda else min(usable_cores(), MAX_CPU_LANES))
        plan = Plan(
            model=spec.name,
            path=_file(spec.path),
            device="cuda:0" if on_cuda else "cpu",
            config=table.config,
            timeout_s=self._timeout_s,
            load_timeout_s=table.load_timeout_s,
            # Tensors begin at aligned places, which requests' limits do not count.
            most=min(MAX_BATCH_BYTES, spec.config.max_request_bytes * spec.max_batch_size)
            + MAX_TENSORS * ALIGN,
            environment=_environment(count, on_cuda),
        )
        loaded = partial(
            LoadedModel,
            spec,
            "cuda" if on_cuda else "cpu",
            buckets=spec.config.buckets,
            optimum=given_optimum_inputs(spec),
            parallel_lanes=not on_cuda,
            rounding=ROUNDING if on_cuda else 1.0,
        )
        if table.isolation == "thread":
            return loaded(open_thread_lanes(plan, count))
        lanes = open_lanes(plan, count)
        return loaded(lanes, free=partial(close_lanes, lanes))

    def _is_on_cuda(self) -> bool:
        visible = os.environ.get(VISIBLE)
        if self._table.device == "cuda":
            if visible == "":
                raise ConfigError(
                    "python.device is 'cuda', but this worker serves on the CPU; expected a worker "
                    "with a GPU (inferq worker --gpu)"
                )
            return True
        return self._table.device == "auto" and bool(os.environ.get("INFERQ_GPU"))

    def _checked_timeout(self) -> float:
        given, most = self._table.timeout_s, self.spec.config.max_run_seconds
        if given is None:
            return min(_DEFAULT_TIMEOUT_S, most / _RUNS)
        if self._table.isolation == "thread":
            raise TableError(
                f'python.timeout_s is {given:g}; expected none beside isolation = "thread", since '
                "a thread cannot be ended"
            )
        if given > most:
            raise TableError(
                f"python.timeout_s is {given:g}; expected at most max_run_seconds, {most:g}"
            )
        return given


def _read(table: Mapping[str, Any]) -> _Table:
    read = validate(_Table, table, "python.")
    try:
        msgspec.msgpack.encode(read.config)
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        raise TableError(f"python.config cannot be handed on: {problem}") from None
    return read


def _file(path: Path | None) -> Path:
    if path is None:
        raise ConfigError("engine 'python' has no model file; expected model.py")
    return path.resolve()


def _environment(lanes: int, on_cuda: bool) -> dict[str, str]:
    """Each lane has its share of the cores; none looks for a GPU that it is not to use."""
    share = str(max(1, usable_cores() // lanes))
    chosen = {name: share for name in _THREADS if name not in os.environ}
    return chosen if on_cuda else {**chosen, VISIBLE: ""}
