"""Parses ONNX files into networks of TensorRT, and builds plans of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from inferq.shared.errors import ConfigError
from inferq.shared.schema import TensorSpec
from inferq.workers.models.ranges import InputRange, Shape
from inferq.workers.trt.api import RTX
from inferq.workers.trt.flavours import ANY_GPU, Flavour
from inferq.workers.trt.logs import joined
from inferq.workers.trt.phases import BuildStopped, Progress

logger = logging.getLogger(__name__)

#: Operators whose outputs are as large as the values of their inputs say.
_DATA_DEPENDENT: Final = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression"})


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


def parse(flavour: Flavour, path: Path, model: bytes | None = None) -> Network:
    """The network of the ONNX file `path`, or of `model` if that is given in its place.

    External data are looked for beside `path`. ConfigError listing the parser's errors.
    """
    builder = flavour.trt.Builder(flavour.logger)
    definition = builder.create_network(0)
    parser = flavour.trt.OnnxParser(definition, flavour.logger)
    file = str(path)
    if not (parser.parse_from_file(file) if model is None else parser.parse(model, file)):
        errors = [_parser_error(parser.get_error(n)) for n in range(parser.num_errors)]
        raise ConfigError(
            f"{path} cannot be parsed by {flavour.name} {flavour.version}: {joined(errors)}"
        )
    inputs = [definition.get_input(n) for n in range(definition.num_inputs)]
    outputs = [definition.get_output(n) for n in range(definition.num_outputs)]
    try:
        return Network(
            inputs=tuple(_spec(flavour, tensor) for tensor in inputs),
            outputs=tuple(_spec(flavour, tensor) for tensor in outputs),
            shape_inputs=tuple(tensor.name for tensor in inputs if tensor.is_shape_tensor),
            builder=builder,
            definition=definition,
            parser=parser,
        )
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem.message}") from None


def data_dependent(network: Network, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
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
    flavour: Flavour,
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
    with flavour.errors.loading() as errors:
        config = network.builder.create_builder_config()
        if workspace_bytes is not None:
            config.set_memory_pool_limit(flavour.trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        if progress is not None:
            config.progress_monitor = _monitor(flavour.trt, progress)
        if flavour.name == RTX and capability != ANY_GPU:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(flavour.trt.ComputeCapability.CURRENT, 0):
                raise ConfigError(flavour.failed("cannot build for the GPU at hand", errors))
        cache = _timing_cache(flavour, config, timing_cache) if flavour.has_timing_cache else None
        for ranges in profiles:
            _add_profile(flavour, network.builder, config, ranges, errors)
        plan = network.builder.build_serialized_network(network.definition, config)
        if plan is None:
            if progress is not None and progress.stopped:
                raise BuildStopped
            raise ConfigError(flavour.failed("could not build the model", errors))
        measured = None if cache is None else bytes(config.get_timing_cache().serialize())
        return bytes(plan), measured


def _add_profile(
    flavour: Flavour, builder: Any, config: Any, ranges: Sequence[InputRange], errors: Sequence[str]
) -> None:
    profile = builder.create_optimization_profile()
    for span in ranges:
        try:
            profile.set_shape(span.name, span.min, span.opt, span.max)
        except (ValueError, RuntimeError) as problem:
            raise ConfigError(
                f"profile of input {span.name!r} is {span.min}, {span.opt}, {span.max}; "
                f"{flavour.name}: {problem}"
            ) from problem
    if config.add_optimization_profile(profile) < 0:
        raise ConfigError(flavour.failed("takes no such optimization profile", errors))


def _timing_cache(flavour: Flavour, config: Any, content: bytes | None) -> Any:
    cache = config.create_timing_cache(content or b"")
    if content and (cache is None or not config.set_timing_cache(cache, False)):
        logger.warning("a timing cache that %s does not take is left out", flavour.name)
        cache, content = config.create_timing_cache(b""), None
    if not content:
        config.set_timing_cache(cache, False)
    # Kept by the caller: it has to outlive the build.
    return cache


def _spec(flavour: Flavour, tensor: Any) -> TensorSpec:
    shape = tuple(None if dim < 0 else int(dim) for dim in tensor.shape)
    return TensorSpec(tensor.name, flavour.dtype_name(tensor.name, tensor.dtype), shape)


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
