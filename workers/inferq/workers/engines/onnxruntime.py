"""Runs ONNX files on ONNX Runtime: on the CPU, or on CUDA where its build and the machine have it.

    [onnxruntime]
    provider = "auto"                # "cpu", "cuda"; auto: CUDA where there is one

On a CPU one session is shared by all lanes, one lane a usable core, one thread a lane, no spinning:
measured to be the best of the combinations. `InferenceSession.run` releases the GIL. On CUDA an
error that stays (an illegal address, an assert) ends the process: nothing runs after it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

# Official builds since 1.29 report what they run to their maker unless this is set beforehand.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.shared.schema import (
    DTYPES,
    MAX_DIMS,
    MAX_TENSORS,
    Array,
    Signature,
    Tensors,
    TensorSpec,
)
from inferq.workers.cuda import memory_share
from inferq.workers.cuda.libcuda import context_failure
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.on_gpu import LANES, ROUNDING, gpu_buckets
from inferq.workers.models.engine import (
    Batch,
    Engine,
    Lane,
    LoadedModel,
    gather,
    reason,
    without_padding,
)
from inferq.workers.models.ranges import given_optimum_inputs
from inferq.workers.models.signatures import Declared, named
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import TomlTable, validate

logger = logging.getLogger(__name__)

#: Protobuf's own limit. Larger models keep their weights in files of their own.
MAX_ONNX_BYTES: Final = (1 << 31) - 1

#: Seconds after which a run on an example is ended.
MAX_PROBE_S: Final = 30.0

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_Providers = Sequence[str | tuple[str, Mapping[str, str]]]
#: Log errors only; warnings about every unused initialiser are of no use to who serves the model.
_LOG_ERRORS: Final = 3
_LOG_FATAL: Final = 4
#: ONNX Runtime's names of element types, where they are not NumPy's.
_ORT_NAMES: Final = {"float": "float32", "double": "float64"}


class _Table(TomlTable):
    """``[onnxruntime]``."""

    provider: Literal["auto", "cpu", "cuda"] = "auto"


class OnnxRuntimeEngine(Engine):
    """Opens one session, which the lanes share."""

    name = "onnxruntime"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = validate(_Table, spec.engine_table, "onnxruntime.")

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        validate(_Table, table, "onnxruntime.")
        options = _session_options()
        # What it does not take is told by what it raises.
        options.log_severity_level = _LOG_FATAL
        # Examples take the memory that they need, and give it back.
        options.enable_cpu_mem_arena = False
        session = _open(path, options, [_CPU])
        _check_ranks(path, session)
        declared = Signature(
            _specs("input", session.get_inputs()), _specs("output", session.get_outputs())
        )
        names = [spec.name for spec in declared.outputs]

        def probe(inputs: Tensors) -> Mapping[str, Array]:
            options = ort.RunOptions()
            # A loop that an example keeps going for ever must not keep other models waiting.
            ended = threading.Timer(MAX_PROBE_S, setattr, (options, "terminate", True))
            ended.daemon = True
            ended.start()
            try:
                return dict(zip(names, session.run(names, inputs, options), strict=True))
            finally:
                ended.cancel()

        return Declared(declared, probe)

    def load(self) -> LoadedModel:
        spec, provider = self.spec, self._table.provider
        available = ort.get_available_providers()
        if provider == "cuda" and _CUDA not in available:
            raise ConfigError(
                "onnxruntime.provider is 'cuda', but this build of ONNX Runtime has only "
                f"{', '.join(available)}; expected the package onnxruntime-gpu"
            )
        cuda = provider != "cpu" and _CUDA in available
        providers: _Providers = [(_CUDA, _cuda_options()), _CPU] if cuda else [_CPU]
        try:
            session = _open(spec.path, _session_options(), providers)
        except ConfigError as problem:
            if cuda and (failure := context_failure()) is not None:
                raise _beyond_use(failure, problem.message) from problem
            raise
        # Where CUDA cannot be started ONNX Runtime quietly falls back.
        on_cuda = _CUDA in session.get_providers()
        if cuda and not on_cuda and (failure := context_failure()) is not None:
            raise _beyond_use(failure, "onnxruntime: the session fell back to the CPU")
        if provider == "cuda" and not on_cuda:
            raise ConfigError("onnxruntime.provider is 'cuda', but no CUDA device could be used")
        count = spec.config.lanes or (LANES if on_cuda else usable_cores())
        return LoadedModel(
            spec,
            "cuda" if on_cuda else "cpu",
            [OnnxRuntimeLane(session, on_cuda=on_cuda) for _ in range(count)],
            buckets=gpu_buckets(spec) if on_cuda else spec.config.buckets,
            optimum=given_optimum_inputs(spec),
            parallel_lanes=not on_cuda,
            rounding=ROUNDING if on_cuda else 1.0,
        )


class OnnxRuntimeLane(Lane):
    """A caller of the shared session."""

    def __init__(self, session: ort.InferenceSession, *, on_cuda: bool = False) -> None:
        self._session = session
        self._on_cuda = on_cuda
        self._names = [output.name for output in session.get_outputs()]

    def run(self, batch: Batch) -> Mapping[str, Array]:
        inputs = gather(batch)
        try:
            arrays: list[Array] = self._session.run(self._names, inputs)
        except Exception as problem:
            raise self._judged(f"onnxruntime: {reason(problem)}") from problem
        return without_padding(batch, dict(zip(self._names, arrays, strict=True)))

    def _judged(self, text: str) -> EngineError:
        """ONNX Runtime tells an error that stays from others by its text alone: CUDA is asked."""
        failure = context_failure() if self._on_cuda else None
        return EngineError(text) if failure is None else _beyond_use(failure, text)


def _beyond_use(failure: str, text: str) -> FatalEngineError:
    return FatalEngineError(f"CUDA is beyond use: {failure} ({text})")


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_ERRORS
    # A plan of memory for each shape is no faster here, keeps a block of its own for each batch
    # size (a third of all memory in service), and is never forgotten.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _cuda_options() -> dict[str, str]:
    """Of the CUDA provider, which takes as much memory as it likes where it is not told.

    Its own choice of algorithms, EXHAUSTIVE, tries all of cuDNN's out whenever a convolution meets
    a new shape: while a request waits, and with the memory that the greediest of them takes.
    """
    limit = memory_share.limit()
    limited = {} if limit is None else {"gpu_mem_limit": str(limit)}
    return {"cudnn_conv_algo_search": "HEURISTIC", **limited}


def _open(
    path: Path | None, options: ort.SessionOptions, providers: _Providers
) -> ort.InferenceSession:
    if path is None:
        raise ConfigError("engine 'onnxruntime' has no model file; expected model.onnx")
    size = path.stat().st_size
    if size > MAX_ONNX_BYTES:
        raise ConfigError(
            f"{path} has {size} bytes; expected at most {MAX_ONNX_BYTES}, "
            "with larger weights in external data files beside it"
        )
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as problem:
        raise ConfigError(
            f"{path} cannot be loaded by ONNX Runtime: {reason(problem)}"
        ) from problem


def _check_ranks(path: Path | None, session: ort.InferenceSession) -> None:
    """ConfigError for an input of unknown rank, which ONNX Runtime does not tell from a scalar."""
    scalars = {node.name for node in session.get_inputs() if not node.shape}
    if not scalars or path is None:
        return
    # Imported only here: few models need it, and it takes its time.
    import onnx  # noqa: PLC0415

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        if value.name in scalars and not value.type.tensor_type.HasField("shape"):
            raise ConfigError(f"input {value.name!r} of the model has no shape; expected a rank")


def _specs(kind: str, nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    if not 1 <= len(nodes) <= MAX_TENSORS:
        raise ConfigError(f"the model has {len(nodes)} {kind}s; expected 1 to {MAX_TENSORS}")
    return tuple(_spec(f"{kind} {node.name!r}", node) for node in nodes)


def _spec(what: str, node: Any) -> TensorSpec:
    element = str(node.type).removeprefix("tensor(").removesuffix(")")
    dtype = _ORT_NAMES.get(element, element)
    if dtype not in DTYPES:
        raise ConfigError(
            f"{what} of the model is a {node.type}; expected a tensor of {', '.join(DTYPES)}"
        )
    if len(node.shape) > MAX_DIMS:
        raise ConfigError(f"{what} of the model has {len(node.shape)} dims; expected ≤ {MAX_DIMS}")
    # A size that the file leaves open is None, or an empty or negative one from older exporters.
    dims = (None if isinstance(dim, int) and dim < 1 else named(dim) for dim in node.shape)
    return TensorSpec(node.name, dtype, tuple(dims))
