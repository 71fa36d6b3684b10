"""TensorRT's two flavours, ``tensorrt`` and ``tensorrt-rtx``, behind one class.

This is the one module that names anything of TensorRT's API. `USED` and `USED_ONLY` list all of it,
so that tests can check the names against a release. Neither flavour is imported before
`find_flavour` is asked for it.

TensorRT's log goes to Python's: errors and warnings as such, its chatter at level DEBUG and below.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np

from inferq.shared.errors import ConfigError, EngineError
from inferq.shared.schema import TensorSpec
from inferq.workers.ranges import InputRange, Shape

logger = logging.getLogger(__name__)

FlavourName = Literal["tensorrt", "tensorrt-rtx"]

TENSORRT: Final = "tensorrt"
RTX: Final = "tensorrt-rtx"
#: Flavour → the module it is imported from, in the order in which "auto" tries them.
MODULES: Final[Mapping[str, str]] = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}
AUTO: Final = "auto"

#: The compute capability of a plan that is bound to none (TensorRT-RTX compiles it when it loads).
ANY_GPU: Final = "any"

#: Class → the names used of it, of both flavours.
USED: Final[Mapping[str, Sequence[str]]] = {
    "Builder": (
        "create_network", "create_builder_config", "create_optimization_profile",
        "build_serialized_network",
    ),
    "INetworkDefinition": ("num_inputs", "num_outputs", "get_input", "get_output"),
    "ITensor": ("name", "dtype", "shape", "is_shape_tensor"),
    "OnnxParser": ("parse", "parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "IBuilderConfig": (
        "add_optimization_profile", "progress_monitor", "set_memory_pool_limit",
    ),
    "MemoryPoolType": ("WORKSPACE",),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    "IHostMemory": ("nbytes",),
    "ILogger": ("log", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype",
        "get_tensor_shape", "get_tensor_profile_shape", "num_optimization_profiles",
        "device_memory_size_v2", "create_runtime_config", "create_execution_context",
    ),
    "TensorIOMode": ("INPUT",),
    "DataType": ("FLOAT", "HALF", "INT8", "INT32", "INT64", "UINT8", "BOOL"),
    "IExecutionContext": (
        "set_optimization_profile_async", "set_input_shape", "infer_shapes", "get_tensor_shape",
        "set_tensor_address", "execute_async_v3",
    ),
}  # fmt: skip
#: The same, of one flavour only.
USED_ONLY: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    TENSORRT: {
        "IBuilderConfig": ("create_timing_cache", "set_timing_cache", "get_timing_cache"),
        "ITimingCache": ("serialize",),
    },
    RTX: {
        "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
        "ComputeCapability": ("CURRENT",),
        "Runtime": ("get_engine_validity",),
        "EngineValidity": ("INVALID", "SUBOPTIMAL"),
        "EngineInvalidityDiagnostics": (
            "VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME",
            "INSUFFICIENT_GPU_MEMORY", "MALFORMED_ENGINE", "CUDA_ERROR",
        ),
        "IRuntimeConfig": (
            "cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache",
        ),
        "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
        "IRuntimeCache": ("serialize", "deserialize"),
        "IExecutionContext": ("is_stream_capturable",),
    },
}  # fmt: skip

#: TensorRT's element types → NumPy's; others do not travel in requests.
_DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip
#: Operators whose outputs are as large as the values of their inputs say.
_DATA_DEPENDENT: Final = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression"})
#: Errors of TensorRT's that a message repeats, and characters of all of them.
_MAX_ERRORS: Final = 5
_MAX_REASON_CHARS: Final = 1000
#: Below DEBUG: a line for every tactic that is tried.
_VERBOSE_LEVEL: Final = 5


class Progress(Protocol):
    """Is told how far a build is; called from TensorRT's threads. Phases nest by their names."""

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """`phase` begins, of `steps` steps, as a part of `parent`."""

    def step(self, phase: str, done: int) -> None:
        """`done` steps of `phase` are over."""

    def finish(self, phase: str) -> None:
        """`phase` is over, or was broken off."""

    @property
    def stopped(self) -> bool:
        """True breaks the build off at its next step."""
        ...


class BuildStopped(Exception):
    """`Progress.stopped` broke a build off."""


@dataclass(frozen=True)
class Network:
    """A parsed model. Its inputs' and outputs' open dims are None."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: Inputs whose values are used as shapes.
    shape_inputs: tuple[str, ...]
    builder: Any = field(repr=False)
    definition: Any = field(repr=False)
    #: What holds the weights until the plan is built.
    parser: Any = field(repr=False)


class Flavour:
    """One flavour as imported. Get it from `find_flavour`; it lives as long as the process."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.version = str(module.__version__)
        self._trt = module
        self._logger, self._errors = _make_logger(module)
        self._runtime: Any = None
        self._dtypes = {getattr(module.DataType, ours): name for ours, name in _DTYPES.items()}

    def __repr__(self) -> str:
        return f"<{self.name} {self.version}>"

    @property
    def builds_anywhere(self) -> bool:
        """Whether plans can be built without a GPU, for any GPU."""
        return self.name == RTX

    @property
    def has_timing_cache(self) -> bool:
        """Whether what a build measured shortens the next one."""
        return self.name == TENSORRT

    @property
    def has_runtime_cache(self) -> bool:
        """Whether what an engine compiled when it was loaded shortens its next load."""
        return self.name == RTX

    @property
    def has_own_graphs(self) -> bool:
        """Whether an execution context captures CUDA graphs by itself (`Loaded.context`)."""
        return self.name == RTX

    # Building

    def parse(self, path: Path, model: bytes | None = None) -> Network:
        """The network of the ONNX file `path`, or of `model` if that is given in its place.

        External data are looked for beside `path`. ConfigError listing the parser's errors.
        """
        self._errors.clear()
        builder = self._trt.Builder(self._logger)
        definition = builder.create_network(0)
        parser = self._trt.OnnxParser(definition, self._logger)
        if model is None:
            parsed = parser.parse_from_file(str(path))
        else:
            parsed = parser.parse(model, str(path))
        if not parsed:
            errors = [_parser_error(parser.get_error(n)) for n in range(parser.num_errors)]
            raise ConfigError(
                f"{path} cannot be parsed by {self.name} {self.version}: {_joined(errors)}"
            )
        inputs = [definition.get_input(n) for n in range(definition.num_inputs)]
        outputs = [definition.get_output(n) for n in range(definition.num_outputs)]
        try:
            return Network(
                inputs=tuple(map(self._spec, inputs)),
                outputs=tuple(map(self._spec, outputs)),
                shape_inputs=tuple(tensor.name for tensor in inputs if tensor.is_shape_tensor),
                builder=builder,
                definition=definition,
                parser=parser,
            )
        except ConfigError as problem:
            raise ConfigError(f"{path}: {problem.message}") from None

    def data_dependent(self, network: Network, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
        """The outputs whose shape is still open once the inputs have these `shapes`."""
        definition = network.definition
        inputs = [definition.get_input(n) for n in range(definition.num_inputs)]
        outputs = [definition.get_output(n) for n in range(definition.num_outputs)]
        declared = [tuple(tensor.shape) for tensor in inputs]
        for tensor in inputs:
            tensor.shape = shapes[tensor.name]
        found = tuple(tensor.name for tensor in outputs if any(dim < 0 for dim in tensor.shape))
        for tensor, shape in zip(inputs, declared, strict=True):
            tensor.shape = shape
        return found

    def build(
        self,
        network: Network,
        profiles: Sequence[Sequence[InputRange]],
        *,
        capability: str = ANY_GPU,
        workspace_bytes: int | None = None,
        timing_cache: bytes | None = None,
        progress: Progress | None = None,
    ) -> tuple[bytes, bytes | None]:
        """The serialized plan of `network`, and the timing cache after its build.

        `profiles`: for each optimization profile the ranges of all inputs that have open dims.
        `capability`: `ANY_GPU`, or the GPU at hand (its value does not matter).
        `timing_cache`: what an earlier build returned; None: empty. Not used where the flavour has
        none. ConfigError with TensorRT's errors; BuildStopped.
        """
        self._errors.clear()
        config = network.builder.create_builder_config()
        if workspace_bytes is not None:
            config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        if progress is not None:
            config.progress_monitor = _monitor(self._trt, progress)
        if self.name == RTX and capability != ANY_GPU:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(self._trt.ComputeCapability.CURRENT, 0):
                raise ConfigError(self._failed("cannot build for the GPU at hand"))
        cache = self._timing_cache(config, timing_cache) if self.has_timing_cache else None
        for ranges in profiles:
            self._add_profile(network.builder, config, ranges)
        plan = network.builder.build_serialized_network(network.definition, config)
        if plan is None:
            if progress is not None and progress.stopped:
                raise BuildStopped
            raise ConfigError(self._failed("could not build the model"))
        measured = None if cache is None else bytes(config.get_timing_cache().serialize())
        return bytes(plan), measured

    def _add_profile(self, builder: Any, config: Any, ranges: Sequence[InputRange]) -> None:
        profile = builder.create_optimization_profile()
        for span in ranges:
            try:
                profile.set_shape(span.name, span.min, span.opt, span.max)
            except (ValueError, RuntimeError) as problem:
                raise ConfigError(
                    f"profile of input {span.name!r} is {span.min}, {span.opt}, {span.max}; "
                    f"{self.name}: {problem}"
                ) from problem
        if config.add_optimization_profile(profile) < 0:
            raise ConfigError(self._failed("takes no such optimization profile"))

    def _timing_cache(self, config: Any, content: bytes | None) -> Any:
        cache = config.create_timing_cache(content or b"")
        if content and (cache is None or not config.set_timing_cache(cache, False)):
            logger.warning("a timing cache that %s does not take is left out", self.name)
            cache, content = config.create_timing_cache(b""), None
        if not content:
            config.set_timing_cache(cache, False)
        # Kept by the caller: it has to outlive the build.
        return cache

    # Running

    def why_unusable(self, plan: bytes) -> str | None:
        """Why `plan` cannot run on the GPU at hand, as far as its header tells; else None."""
        if self.name != RTX:
            return None
        validity, found = self._get_runtime().get_engine_validity(plan)
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            logger.warning("the plan may run slowly on this GPU")
        if validity != self._trt.EngineValidity.INVALID:
            return None
        bits = self._trt.EngineInvalidityDiagnostics
        reasons = [
            name.lower().replace("_", " ")
            for name in USED_ONLY[RTX]["EngineInvalidityDiagnostics"]
            if int(found) & int(getattr(bits, name))
        ]
        return ", ".join(reasons) or "no GPU that it could run on"

    def deserialize(self, plan: bytes) -> Loaded:
        """`plan` on the current CUDA context. A plan is code: only of `Plan.load`. ConfigError."""
        self._errors.clear()
        engine = self._get_runtime().deserialize_cuda_engine(plan)
        if engine is None:
            reason = self.why_unusable(plan)
            raise ConfigError(
                self._failed("could not load the plan" + (f" ({reason})" if reason else ""))
            )
        return Loaded(self, engine)

    def _get_runtime(self) -> Any:
        # Engines need it for as long as they live.
        if self._runtime is None:
            self._runtime = self._trt.Runtime(self._logger)
        return self._runtime

    def _spec(self, tensor: Any) -> TensorSpec:
        shape = tuple(None if dim < 0 else int(dim) for dim in tensor.shape)
        return TensorSpec(tensor.name, self.dtype_name(tensor.name, tensor.dtype), shape)

    def dtype_name(self, tensor: str, dtype: Any) -> str:
        """NumPy's name of TensorRT's `dtype`. ConfigError naming `tensor` if it has none."""
        name = self._dtypes.get(dtype)
        if name is None:
            raise ConfigError(f"{tensor!r} is {dtype}; expected one of {', '.join(_DTYPES)}")
        return name

    def _failed(self, what: str) -> str:
        return f"{self.name} {self.version} {what}: {self.last_errors()}"

    def last_errors(self) -> str:
        """What TensorRT last logged as errors, in one line."""
        return _joined(list(self._errors))


@dataclass(frozen=True)
class IOTensor:
    """An input or output of a loaded plan. Open dims of `shape` are -1."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    shape: Shape


class Loaded:
    """A plan on the GPU. Close it, after its contexts, while the CUDA context is current."""

    def __init__(self, flavour: Flavour, engine: Any) -> None:
        self._flavour = flavour
        self._engine = engine
        self.tensors = tuple(map(self._tensor, range(engine.num_io_tensors)))
        #: Optimization profiles.
        self.profiles: int = engine.num_optimization_profiles
        #: Bytes of device memory that each of its contexts takes, tensors not counted.
        self.context_bytes: int = engine.device_memory_size_v2

    def _tensor(self, index: int) -> IOTensor:
        trt, engine = self._flavour._trt, self._engine
        name = engine.get_tensor_name(index)
        return IOTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=np.dtype(self._flavour.dtype_name(name, engine.get_tensor_dtype(name))),
            shape=tuple(engine.get_tensor_shape(name)),
        )

    def close(self) -> None:
        """Free it, whoever else still holds this object. Idempotent."""
        self._engine = None

    def range(self, name: str, profile: int = 0) -> InputRange:
        """What input `name` may be in `profile`."""
        shapes = self._engine.get_tensor_profile_shape(name, profile)
        least, best, most = (tuple(shape) for shape in shapes)
        return InputRange(name, least, best, most)

    def context(self, *, graphs: bool = False, runtime_cache: bytes | None = None) -> Context:
        """A new execution context; its device memory is taken now. EngineError.

        Where the flavour has them: `graphs` has it capture CUDA graphs by itself, and
        `runtime_cache` is what `Context.runtime_cache` returned in an earlier process.
        """
        self._flavour._errors.clear()
        trt = self._flavour._trt
        config, cache = self._engine.create_runtime_config(), None
        if graphs and self._flavour.has_own_graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._flavour.has_runtime_cache:
            cache = config.create_runtime_cache()
            if runtime_cache and not cache.deserialize(runtime_cache):
                logger.info("the runtime cache is of another GPU, driver or version: compiling")
            config.set_runtime_cache(cache)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise EngineError(self._flavour._failed("could not create an execution context"))
        return Context(self._flavour, self, context, cache)


class Context:
    """One execution context: one lane's. Streams and addresses are plain integers.

    Close it before its plan, while the CUDA context is current.

    `set_shape` and `set_address` hold the GIL: call them when the batch size changes, not per
    batch. `execute` and `infer_shapes` release it. All but `shape` raise EngineError.
    """

    def __init__(self, flavour: Flavour, loaded: Loaded, context: Any, cache: Any) -> None:
        self._flavour = flavour
        # The plan and the cache have to outlive the context.
        self._loaded = loaded
        self._cache = cache
        self._context = context

    def close(self) -> None:
        """Free it, while the CUDA context is current and nothing of it runs. Idempotent."""
        self._context = self._cache = None

    def set_profile(self, index: int, stream: int) -> None:
        """Take optimization profile `index`; in force once `stream` has got there."""
        self._check(self._context.set_optimization_profile_async(index, stream), "profile", index)

    def set_shape(self, name: str, shape: Shape) -> None:
        """Give input `name` its whole shape, within the profile."""
        self._check(self._context.set_input_shape(name, shape), f"shape of {name!r}", shape)

    def infer_shapes(self) -> None:
        """Work out the outputs' shapes, once all inputs have theirs."""
        missing = self._context.infer_shapes()
        if missing:
            raise EngineError(f"{self._flavour.name}: no shape was set of {', '.join(missing)}")

    def shape(self, name: str) -> Shape:
        """The shape of tensor `name`; -1 where it is not known before the run (data-dependent)."""
        return tuple(self._context.get_tensor_shape(name))

    def set_address(self, name: str, address: int) -> None:
        """Where tensor `name` is in device memory."""
        self._check(self._context.set_tensor_address(name, address), f"address of {name!r}", None)

    def execute(self, stream: int) -> None:
        """Enqueue one run on `stream` (not the default stream)."""
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._flavour.name}: {self._flavour.last_errors()}")

    def is_capturable(self, stream: int) -> bool:
        """Whether a CUDA graph may be captured of `execute` on `stream` now."""
        if self._flavour.name != RTX:
            return True
        return bool(self._context.is_stream_capturable(stream))

    def runtime_cache(self) -> bytes | None:
        """What was compiled up to now, for later processes; None where the flavour has none."""
        if self._cache is None:
            return None
        content = self._cache.serialize()
        return bytes(content) if content is not None and content.nbytes else None

    def _check(self, accepted: bool, what: str, value: object) -> None:
        if not accepted:
            shown = "" if value is None else f" {value}"
            raise EngineError(
                f"{self._flavour.name} refused the {what}{shown}: {self._flavour.last_errors()}"
            )


def used(flavour: str) -> dict[str, tuple[str, ...]]:
    """Class → all names that are used of it in `flavour`."""
    only = USED_ONLY[flavour]
    return {
        name: (*USED.get(name, ()), *only.get(name, ()))
        for name in dict.fromkeys([*USED, *only])
    }  # fmt: skip


def find_flavour(name: str = AUTO) -> Flavour:
    """The flavour `name`, or with "auto" the first that is installed. ConfigError if none is."""
    if name != AUTO and name not in MODULES:
        raise ConfigError(f"flavour is {name!r}; expected auto, {', '.join(MODULES)}")
    problems: list[str] = []
    for each in MODULES if name == AUTO else [name]:
        try:
            return _import(each)
        # Its own libraries are loaded meanwhile, and each way to fail raises something else.
        except Exception as problem:  # noqa: BLE001
            problems.append(f"{each}: {' '.join(str(problem).split())[:200]}")
    wanted = list(MODULES) if name == AUTO else [name]
    install = " or ".join(f"'inferq[{each}]'" for each in wanted)
    if RTX in wanted:
        install += "; to build without a GPU pip install tensorrt-rtx-cu13 will do"
    raise ConfigError(
        f"flavour {name!r} cannot be imported ({'; '.join(problems)}); "
        f"to install it: pip install {install}"
    )


@functools.cache
def _import(name: str) -> Flavour:
    return Flavour(name, importlib.import_module(MODULES[name]))


def _make_logger(trt: Any) -> tuple[Any, deque[str]]:
    """A logger for TensorRT, of which it wants one per process, and the errors last logged."""
    errors: deque[str] = deque(maxlen=_MAX_ERRORS)
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: _VERBOSE_LEVEL,
    }

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.ERROR)
            if level >= logging.ERROR:
                errors.append(" ".join(message.split()))
            logger.log(level, "%s", message)

    return Log(), errors


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            progress.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            progress.step(phase, step + 1)
            return not progress.stopped

        def phase_finish(self, phase: str) -> None:
            progress.finish(phase)

    return Monitor()


def _parser_error(error: Any) -> str:
    operator, name = error.node_operator(), error.node_name()
    where = f"{operator} {name!r}: " if operator else ""
    why = " (its output's shape depends on the data)" if operator in _DATA_DEPENDENT else ""
    return where + " ".join(error.desc().split()) + why


def _joined(errors: Sequence[str]) -> str:
    text = "; ".join(errors) or "it logged no reason"
    return text if len(text) <= _MAX_REASON_CHARS else text[:_MAX_REASON_CHARS] + "…"
