"""Does a plan answer as ONNX Runtime does? Compares them on zeros, random and given inputs.

The error of an output of floats is its largest absolute difference, divided by the largest
magnitude that ONNX Runtime gave that output on any of the inputs, plus `FLOOR`: relative to what
the output can be, absolute for what is as good as zero. The error of an output of integers or
flags is the share of its elements that differ, times `PER_MISMATCH`: where two scores are near,
rounding may turn the index of the larger one over. Not-a-number on one side only is an infinite
error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from inferq.shared.errors import ConfigError, RequestError
from inferq.shared.schema import Array, Tensors, check_inputs
from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine
from inferq.workers.models.array_files import read_npz
from inferq.workers.models.engine import Batch
from inferq.workers.models.ranges import InputRange
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.builder import BuildRequest
from inferq.workers.trt.phases import Progress, phase, stepped
from inferq.workers.trt.plans import Plan, PlanFolder

#: Inputs → outputs, by their names.
Run = Callable[[Tensors], Mapping[str, Array]]

#: Largest error by precision. TensorRT multiplies float32 as TF32, whose mantissa is float16's.
LIMITS: Final[Mapping[str, float]] = {"fp32": 0.01, "fp16": 0.05}
FLOOR: Final = 1e-3
PER_MISMATCH: Final = 0.1
#: Elements of all inputs of one sample: 256 MB of float32.
MAX_SAMPLE_ELEMENTS: Final = 1 << 26
#: What is shown while both compute.
REFERENCE_PHASE: Final = "Verifying: ONNX Runtime"
PLAN_PHASE: Final = "Verifying: the plan"


def verify(
    run: Run,
    spec: ModelSpec,
    samples: Sequence[Tensors],
    *,
    precision: str = "fp32",
    limit: float | None = None,
    progress: Progress | None = None,
) -> float:
    """The largest error of `run` on any of `samples`, against ONNX Runtime on the model of `spec`.

    `limit`: None: that of `precision`. Raises ConfigError: the error is above the limit, or outputs
    differ in name, dtype or shape; BuildStopped. What `run` raises is passed on.
    """
    most = LIMITS[precision] if limit is None else limit
    expected: list[Mapping[str, Array]] = []
    with phase(progress, REFERENCE_PHASE, len(samples)):
        for answer in _reference(spec, samples):
            expected.append(answer)
            stepped(progress, REFERENCE_PHASE, len(expected))
    scales = _scales(expected)
    worst, where = 0.0, ""
    with phase(progress, PLAN_PHASE, len(samples)):
        for index, (sample, right) in enumerate(zip(samples, expected, strict=True), 1):
            given = run(sample)
            for name, array in right.items():
                error = _error(name, given.get(name), array, scales[name])
                if error >= worst:
                    worst, where = error, f"output {name!r} of sample {index}"
            stepped(progress, PLAN_PHASE, index)
    if not worst <= most:
        raise ConfigError(
            f"model {spec.name!r} as {precision} differs from ONNX Runtime by {worst:.3g} "
            f"({where}); expected at most {most:g} of the output's largest magnitude"
        )
    return worst


def verify_plan(
    order: BuildRequest,
    folder: PlanFolder,
    plan: Plan,
    run: Run,
    given: Sequence[Tensors] = (),
    *,
    progress: Progress | None = None,
) -> Plan:
    """Verify that `run` runs `plan` of `order` right, on `make_samples` of each of its profiles and
    on what is `given`.

    Returns the plan with its record saying so. Raises what `verify` raises.
    """
    made = (make_samples(order.spec, ranges) for ranges in order.profiles)
    samples = [*chain.from_iterable(made), *given]
    error = verify(run, order.spec, samples, precision=order.precision, progress=progress)
    return folder.verified(plan, error)


def make_samples(spec: ModelSpec, ranges: Sequence[InputRange]) -> list[dict[str, Array]]:
    """Inputs at the smallest, optimum and largest shapes of `ranges`: zeros, then random ones.

    The same ones every time. Floats are normally distributed; integers are 0 and 1, which most
    models take as indices, too; bytes are any.
    """
    rng = np.random.default_rng(0)
    samples: list[dict[str, Array]] = []
    dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.signature.inputs}
    all_shapes = (
        tuple((span.name, span.min) for span in ranges),
        tuple((span.name, span.opt) for span in ranges),
        tuple((span.name, span.max) for span in ranges),
    )
    for shapes in dict.fromkeys(all_shapes):
        if samples and sum(math.prod(shape) for _, shape in shapes) > MAX_SAMPLE_ELEMENTS:
            continue
        if not samples:
            samples.append({name: np.zeros(shape, dtypes[name]) for name, shape in shapes})
        samples.append({name: _random(rng, shape, dtypes[name]) for name, shape in shapes})
    return samples


def load_samples(path: Path, spec: ModelSpec) -> list[dict[str, Array]]:
    """One request's inputs from an .npz file. ConfigError naming what does not fit the model."""
    sample = read_npz(path)
    try:
        check_inputs(spec.advert(0.0, 1), sample)
    except RequestError as problem:
        raise ConfigError(f"{path}: {problem.message}") from problem
    return [sample]


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    most = 256 if dtype == np.uint8 else 2
    return rng.integers(0, most, shape).astype(dtype)


def _reference(spec: ModelSpec, samples: Sequence[Tensors]) -> Iterator[Mapping[str, Array]]:
    loaded = OnnxRuntimeEngine(replace(spec, engine_table={"provider": "cpu"})).load()
    with closing(loaded):
        for sample in samples:
            # One part and no padding: the arrays pass as they are.
            yield loaded.lanes[0].run(Batch([sample], 1, 1, batchable=False))


def _scales(answers: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    scales: dict[str, float] = {}
    for answer in answers:
        for name, array in answer.items():
            if array.dtype.kind != "f":
                scales[name] = 0.0
                continue
            finite = np.abs(array[np.isfinite(array)].astype(np.float64))
            scales[name] = max(scales.get(name, 0.0), float(finite.max(initial=0.0)))
    return scales


def _error(name: str, given: Array | None, right: Array, scale: float) -> float:
    if given is None or given.shape != right.shape or given.dtype != right.dtype:
        shown = "missing" if given is None else f"{given.dtype}{list(given.shape)}"
        raise ConfigError(f"output {name!r} is {shown}; expected {right.dtype}{list(right.shape)}")
    if not right.size:
        return 0.0
    if right.dtype.kind != "f":
        return float(np.mean(given != right)) * PER_MISMATCH
    a, b = given.astype(np.float64), right.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.all(np.isfinite(a[~same]) & np.isfinite(b[~same])):
        return math.inf
    return float(np.abs(a[~same] - b[~same]).max(initial=0.0)) / (scale + FLOOR)
