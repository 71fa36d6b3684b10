"""TensorRT's two flavours, ``tensorrt`` and ``tensorrt-rtx``, behind one class: what builds plans.

Neither flavour is imported before `find_flavour` is asked for it. What runs plans is in `running`,
what is used of TensorRT's API in `api`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from inferq.shared.errors import ConfigError
from inferq.shared.schema import TensorSpec
from inferq.workers.models.ranges import InputRange, Shape
from inferq.workers.trt.api import DTYPES, MODULES, RTX, TENSORRT, USED_ONLY
from inferq.workers.trt.logs import joined, make_logger
from inferq.workers.trt.running import Loaded

logger = logging.getLogger(__name__)

AUTO: Final = "auto"

#: The compute capability of a plan that is bound to none (TensorRT-RTX compiles it when it loads).
ANY_GPU: Final = "any"

#: Operators whose outputs are as large as the values of their inputs say.
_DATA_DEPENDENT: Final = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression"})


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
        self._logger, self.errors = make_logger(module)
        self._runtime: Any = None
        self._dtypes = {getattr(module.DataType, ours): name for ours, name in DTYPES.items()}

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
                f"{path} cannot be parsed by {self.name} {self.version}: {joined(errors)}"
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
        with self.errors.loading() as errors:
            config = network.builder.create_builder_config()
            if workspace_bytes is not None:
                config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, workspace_bytes)
            if progress is not None:
                config.progress_monitor = _monitor(self._trt, progress)
            if self.name == RTX and capability != ANY_GPU:
                config.num_compute_capabilities = 1
                if not config.set_compute_capability(self._trt.ComputeCapability.CURRENT, 0):
                    raise ConfigError(self.failed("cannot build for the GPU at hand", errors))
            cache = self._timing_cache(config, timing_cache) if self.has_timing_cache else None
            for ranges in profiles:
                self._add_profile(network.builder, config, ranges, errors)
            plan = network.builder.build_serialized_network(network.definition, config)
            if plan is None:
                if progress is not None and progress.stopped:
                    raise BuildStopped
                raise ConfigError(self.failed("could not build the model", errors))
            measured = None if cache is None else bytes(config.get_timing_cache().serialize())
            return bytes(plan), measured

    def _add_profile(
        self, builder: Any, config: Any, ranges: Sequence[InputRange], errors: Sequence[str]
    ) -> None:
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
            raise ConfigError(self.failed("takes no such optimization profile", errors))

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
        with self.errors.loading() as errors:
            engine = self._get_runtime().deserialize_cuda_engine(plan)
            if engine is None:
                reason = self.why_unusable(plan)
                what = "could not load the plan" + (f" ({reason})" if reason else "")
                raise ConfigError(self.failed(what, errors))
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
            raise ConfigError(f"{tensor!r} is {dtype}; expected one of {', '.join(DTYPES)}")
        return name

    def failed(self, what: str, errors: Sequence[str]) -> str:
        """The message of a call that failed with these `errors`."""
        return f"{self.name} {self.version} {what}: {joined(errors)}"


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
