"""Turns a model of the repository into a plan, or finds the plan that was built before."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Final

import msgspec

from inferq.shared.errors import ConfigError
from inferq.shared.schema import TensorSpec
from inferq.workers.cuda.libcuda import GpuKind
from inferq.workers.engines.on_gpu import check_names
from inferq.workers.models.ranges import InputRange, Sizes, input_ranges, profile_sizes
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.flavours import ANY_GPU, Flavour
from inferq.workers.trt.model_digest import model_digest
from inferq.workers.trt.network import Network, build, data_dependent, parse
from inferq.workers.trt.phases import Progress, phase
from inferq.workers.trt.plan_record import PlanKey, new_record
from inferq.workers.trt.plans import VARIABLE, Plan, PlanFolder, timing_cache_name
from inferq.workers.trt.precision import check_precision, prepare
from inferq.workers.trt.profiles import open_ranges

logger = logging.getLogger(__name__)

FILE: Final = "model.onnx"


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built. `gpu` is of the kind at hand; None: there is none.

    `batch`: the smallest, optimum and largest batch in place of model.toml's. `workspace_bytes`:
    the most device memory that a kernel may take for itself while it runs; None: all there is.
    """

    spec: ModelSpec
    flavour: Flavour
    precision: str = "fp32"
    batch: Sizes | None = None
    gpu: GpuKind | None = None
    workspace_bytes: int | None = None

    @property
    def profiles(self) -> tuple[tuple[InputRange, ...], ...]:
        """The shapes of all inputs, of each optimization profile, the smallest profile first.

        ConfigError: nothing says how large they may be.
        """
        sizes = profile_sizes(self.spec, self.batch)
        return tuple(input_ranges(self.spec, each) for each in sizes)


def ensure_plan(
    order: BuildRequest,
    folder: PlanFolder,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> Plan:
    """The plan of `order`: from `folder`, or else built and stored there.

    A plan that is bound to no GPU serves every one. `force` builds in any case. ConfigError: the
    plan in the folder is altered, the model cannot be built, or another process has been building
    it for `plan_lock.LOCK_WAIT_S`; BuildStopped.
    """
    folder.open()
    with phase(progress, "Hashing the model"):
        key = plan_key(order)
    spec = order.spec
    with folder.lock(spec.name, spec.version, key, progress=progress) as writable:
        if not force:
            with phase(progress, "Looking for the plan"):
                plan = _found(order, key, folder)
            if plan is not None:
                return plan
        if not writable:
            raise ConfigError(
                f"{folder.path} cannot be written, and holds no such plan of model {spec.name!r}; "
                f"expected one that `inferq build` put there, or another folder: set {VARIABLE}"
            )
        return _build(order, key, folder, progress)


def plan_key(order: BuildRequest) -> PlanKey:
    """What the plan of `order` depends on. ConfigError: it cannot be built here at all."""
    check_precision(order.precision)
    flavour, path = order.flavour, order.spec.path
    if path is None or path.name != FILE:
        raise ConfigError(
            f"model {order.spec.name!r} is served from {path.name if path else 'no file'}; "
            f"expected {FILE}: TensorRT builds ONNX files"
        )
    check_names(order.spec.signature, 'engine = "tensorrt"')
    if order.gpu is None and not flavour.builds_anywhere:
        raise ConfigError(
            f"flavour is {flavour.name!r}, which builds only where there is a GPU, and none was "
            "found; expected --flavour tensorrt-rtx"
        )
    return PlanKey(
        model=model_digest(path),
        flavour=flavour.name,
        flavour_version=flavour.version,
        capability=order.gpu.capability if order.gpu else ANY_GPU,
        gpu=str(order.gpu) if order.gpu else ANY_GPU,
        precision=order.precision,
        profiles=order.profiles,
    )


def _found(order: BuildRequest, key: PlanKey, folder: PlanFolder) -> Plan | None:
    for each in _acceptable(order, key):
        plan = folder.find(order.spec.name, order.spec.version, each)
        if plan is not None:
            return plan
    return None


def _acceptable(order: BuildRequest, key: PlanKey) -> list[PlanKey]:
    """The keys of the plans that serve as well, the best first."""
    if not order.flavour.builds_anywhere or key.capability == ANY_GPU:
        return [key]
    return [key, msgspec.structs.replace(key, capability=ANY_GPU, gpu=ANY_GPU)]


def _build(
    order: BuildRequest, key: PlanKey, folder: PlanFolder, progress: Progress | None
) -> Plan:
    began = time.monotonic()
    spec, flavour = order.spec, order.flavour
    assert spec.path is not None
    logger.info("building %s %s as %s for %s", spec.name, spec.version, order.precision, flavour)
    with phase(progress, "Reading the network"):
        model = prepare(spec.path, order.precision)
        network = parse(flavour, spec.path, model)
    _check_tensors(spec, network)
    _check_shapes(spec, flavour, network, key.profiles)
    open_ones = [open_ranges(spec, ranges) for ranges in key.profiles]
    cache_name = timing_cache_name(key)
    plan, measured = build(
        flavour,
        network,
        open_ones if any(open_ones) else [],
        capability=key.capability,
        workspace_bytes=order.workspace_bytes,
        timing_cache=folder.read_cache(cache_name) if flavour.has_timing_cache else None,
        progress=progress,
    )
    if model_digest(spec.path) != key.model:
        raise ConfigError(f"{spec.path} was changed while it was built; expected it to stay")
    if measured is not None:
        folder.write_cache(cache_name, measured)
    record = new_record(key, spec.name, spec.version, time.monotonic() - began)
    logger.info("built %s in %.1f s: %.1f MB", spec.name, record.seconds, len(plan) / 1e6)
    return folder.store(record, plan)


def _check_tensors(spec: ModelSpec, network: Network) -> None:
    """ConfigError unless TensorRT sees the inputs and outputs that the signature has."""
    for kind, ours, theirs in (
        ("input", spec.signature.inputs, network.inputs),
        ("output", spec.signature.outputs, network.outputs),
    ):
        found = {tensor.name: tensor for tensor in theirs}
        if found.keys() != {tensor.name for tensor in ours}:
            raise ConfigError(
                f"{spec.path}: TensorRT sees the {kind}s {', '.join(sorted(found))}; "
                f"expected {', '.join(sorted(tensor.name for tensor in ours))}"
            )
        for tensor in ours:
            _check_tensor(spec, kind, tensor, found[tensor.name])


def _check_tensor(spec: ModelSpec, kind: str, ours: TensorSpec, theirs: TensorSpec) -> None:
    if theirs.dtype != ours.dtype:
        raise ConfigError(
            f"{spec.path}: {kind} {ours.name!r} is {ours.dtype}, of which TensorRT makes "
            f"{theirs.dtype}; expected an {kind} that it takes as it is "
            '(ONNX Runtime serves such models: engine = "onnxruntime")'
        )


def _check_shapes(
    spec: ModelSpec,
    flavour: Flavour,
    network: Network,
    profiles: tuple[tuple[InputRange, ...], ...],
) -> None:
    if network.shape_inputs:
        raise ConfigError(
            f"{spec.path}: the values of input {network.shape_inputs[0]!r} are used as a shape; "
            "expected shapes that follow from the inputs' shapes"
        )
    found = data_dependent(network, {span.name: span.opt for span in profiles[0]})
    if found:
        raise ConfigError(
            f"{spec.path}: the shape of output {found[0]!r} depends on the inputs' values, so that "
            "no buffer can be laid out for it; expected shapes that follow from the inputs' shapes "
            '(ONNX Runtime serves such models: engine = "onnxruntime")'
        )
