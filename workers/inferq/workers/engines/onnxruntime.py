"""Runs ONNX files on ONNX Runtime: on the CPU, or on CUDA where its build and the machine have it.

On a CPU one session is shared by all lanes, one lane a usable core, one thread a lane, no spinning:
measured to be the best of the combinations (`onnx_options` has the knobs). `InferenceSession.run`
releases the GIL. On CUDA an error that stays (an illegal address, an assert) ends the process:
nothing runs after it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

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
    is_text,
)
from inferq.workers.cuda.libcuda import context_failure
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.on_gpu import LANES, ROUNDING, gpu_buckets
from inferq.workers.engines.onnx_edit import (
    MAPS,
    WEIGHTS_FOLDER,
    keep_outputs,
    read,
    take_maps_out,
)
from inferq.workers.engines.onnx_options import (
    Table,
    check,
    cuda_options,
    lacks_operators,
    run_options,
    session_options,
)
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
from inferq.workers.models.validation import validate

logger = logging.getLogger(__name__)

#: Protobuf's own limit. Larger models keep their weights in files of their own.
MAX_ONNX_BYTES: Final = (1 << 31) - 1

#: Seconds after which a run on an example is ended.
MAX_PROBE_S: Final = 30.0

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_Providers = Sequence[str | tuple[str, Mapping[str, str]]]
_LOG_FATAL: Final = 4
#: ONNX Runtime's names of element types, where they are not NumPy's.
_ORT_NAMES: Final = {"float": "float32", "double": "float64"}


class OnnxRuntimeEngine(Engine):
    """Opens one session, which the lanes share."""

    name = "onnxruntime"
    any_layout = True

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = _checked(spec.engine_table)

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        options = session_options(_checked(table), path)
        # Examples run one by one.
        options.intra_op_num_threads = 1
        # What it does not take is told by what it raises.
        options.log_severity_level = _LOG_FATAL
        # Examples take the memory that they need, and give it back.
        options.enable_cpu_mem_arena = False
        session, labels = _open(path, options, [_CPU])
        _check_ranks(path, session)
        inputs = _specs("input", session.get_inputs())
        outputs, unserved = _outputs(session)
        declared = Signature(inputs, outputs, _optional(session, len(inputs)))
        names = [spec.name for spec in outputs]

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

        return Declared(declared, probe, unserved, labels)

    def load(self) -> LoadedModel:
        spec, table = self.spec, self._table
        provider = table.provider
        available = ort.get_available_providers()
        if provider == "cuda" and _CUDA not in available:
            raise ConfigError(
                "onnxruntime.provider is 'cuda', but this build of ONNX Runtime has only "
                f"{', '.join(available)}; expected the package onnxruntime-gpu"
            )
        cuda = provider != "cpu" and _CUDA in available
        providers: _Providers = [(_CUDA, cuda_options(table)), _CPU] if cuda else [_CPU]
        try:
            session, _ = _open(
                spec.path,
                session_options(table, spec.path),
                providers,
                spec.config.outputs,
            )
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
        names = [output.name for output in spec.signature.outputs]
        options = run_options(table, on_cuda=on_cuda)
        count = spec.config.lanes or (LANES if on_cuda else max(1, usable_cores() // table.threads))
        return LoadedModel(
            spec,
            "cuda" if on_cuda else "cpu",
            [OnnxRuntimeLane(session, names, options, on_cuda=on_cuda) for _ in range(count)],
            buckets=gpu_buckets(spec) if on_cuda else spec.config.buckets,
            optimum=given_optimum_inputs(spec),
            parallel_lanes=not on_cuda,
            rounding=ROUNDING if on_cuda else 1.0,
        )


class OnnxRuntimeLane(Lane):
    """A caller of the shared session."""

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[str] = (),
        options: ort.RunOptions | None = None,
        *,
        on_cuda: bool = False,
    ) -> None:
        """`names`: the outputs to compute; by default all."""
        self._session = session
        self._on_cuda = on_cuda
        self._options = options
        every = [output.name for output in session.get_outputs()]
        self._names = list(names) or every

    def run(self, batch: Batch) -> Mapping[str, Array]:
        inputs = gather(batch)
        names = self._names if batch.outputs is None else batch.outputs
        try:
            arrays: list[Array] = self._session.run(names, inputs, self._options)
        except Exception as problem:
            raise self._judged(f"onnxruntime: {reason(problem)}") from problem
        return without_padding(batch, dict(zip(names, arrays, strict=True)))

    def _judged(self, text: str) -> EngineError:
        """ONNX Runtime tells an error that stays from others by its text alone: CUDA is asked."""
        failure = context_failure() if self._on_cuda else None
        return EngineError(text) if failure is None else _beyond_use(failure, text)


def _checked(table: Mapping[str, Any]) -> Table:
    checked = validate(Table, table, "onnxruntime.")
    check(checked)
    return checked


def _beyond_use(failure: str, text: str) -> FatalEngineError:
    return FatalEngineError(f"CUDA is beyond use: {failure} ({text})")


def _open(
    path: Path | None,
    options: ort.SessionOptions,
    providers: _Providers,
    outputs: Collection[str] = (),
) -> tuple[ort.InferenceSession, tuple[str, ...]]:
    """A session of the model in `path`, and the labels of its classes if it tells them.

    `outputs`: the only ones that are wanted; by default all are.
    """
    if path is None:
        raise ConfigError("engine 'onnxruntime' has no model file; expected model.onnx")
    size = path.stat().st_size
    if size > MAX_ONNX_BYTES:
        raise ConfigError(
            f"{path} has {size} bytes; expected at most {MAX_ONNX_BYTES}, "
            "with larger weights in external data files beside it"
        )
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
        names = [output.name for output in session.get_outputs()]
        maps = any(output.type.startswith(MAPS) for output in session.get_outputs())
        fewer = bool(outputs) and len(outputs) < len(names)
        if not (maps or fewer) or (model := read(path)) is None:
            return session, ()
        del session
        labels = take_maps_out(model) if maps else ()
        if fewer:
            keep_outputs(model, outputs)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
        model = model.SerializeToString()
        return ort.InferenceSession(model, options, providers=list(providers)), labels
    except Exception as problem:
        raise ConfigError(
            f"{path} cannot be loaded by ONNX Runtime: {reason(problem)}"
            f"{lacks_operators(str(problem))}"
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


def _outputs(session: ort.InferenceSession) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    """Those that can be served, and why others cannot. ConfigError: none can."""
    found, unserved = [], {}
    for node in session.get_outputs():
        what = f"output {node.name!r}"
        try:
            found.append(_spec(what, node))
        except ConfigError as problem:
            maps = str(node.type).startswith(MAPS)
            hint = "; export the classifier with zipmap=False" if maps else ""
            unserved[node.name] = problem.message + hint
    if not found and unserved:
        raise ConfigError(next(iter(unserved.values())))
    if not 1 <= len(found) <= MAX_TENSORS:
        raise ConfigError(f"the model has {len(found)} outputs; expected 1 to {MAX_TENSORS}")
    return tuple(found), unserved


def _optional(session: ort.InferenceSession, inputs: int) -> tuple[TensorSpec, ...]:
    """Initialisers that a request may replace.

    None if they are so many that they are the weights: some exporters list all among the inputs.
    And none that would have rows: an open dim is not the same of all who share a batch.
    """
    found: list[TensorSpec] = []
    for node in session.get_overridable_initializers():
        with suppress(ConfigError):
            spec = _spec(f"input {node.name!r}", node)
            if all(isinstance(dim, int) for dim in spec.shape) and not is_text(spec.dtype):
                found.append(spec)
    return tuple(found) if inputs + len(found) <= MAX_TENSORS else ()


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
