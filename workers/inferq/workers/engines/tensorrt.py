"""Runs ONNX files as TensorRT plans, on lanes of a CUDA device.

    [tensorrt]
    flavour = "auto"                 # "tensorrt", "tensorrt-rtx"; auto: what is installed
    precision = "fp32"               # "fp16": inner tensors; inputs and outputs stay as they are
    cuda_graphs = true

The plan comes from the plan cache, or is built when the model is loaded (`inferq build` does that
beforehand). A plan that was built without a GPU is compared with ONNX Runtime before it serves.
Nothing of CUDA is imported before `load`: a signature can be read anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Signature, Tensors
from inferq.workers.engines.base import Batch, Engine, EngineOptions, Lane
from inferq.workers.tuning import sizes
from inferq.workers.validation import Flag, TomlTable, validate

if TYPE_CHECKING:
    from inferq.workers.cuda.device import Device
    from inferq.workers.cuda.lane import CudaLane
    from inferq.workers.repository import ModelSpec
    from inferq.workers.trt.flavours import Flavour, Loaded
    from inferq.workers.trt.plans import Plan, PlanFolder

logger = logging.getLogger(__name__)

#: One lane's copies hide behind the other's compute.
LANES: Final = 2


class _Table(TomlTable):
    """``[tensorrt]``."""

    flavour: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    precision: Literal["fp32", "fp16"] = "fp32"
    cuda_graphs: Flag = True


class TensorRTEngine(Engine):
    """One plan; an execution context for each lane."""

    name = "tensorrt"

    def __init__(self, path: Path | None, options: EngineOptions) -> None:
        super().__init__(path, options)
        self._table = validate(_Table, options.table, "tensorrt.")
        self._device: Device | None = None
        self._loaded: Loaded | None = None
        self._lanes: list[CudaLane] = []

    @classmethod
    def read_signature(cls, path: Path | None, table: Mapping[str, Any]) -> Signature:
        """As ONNX Runtime reads it from the same file, on the CPU."""
        from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine  # noqa: PLC0415

        validate(_Table, table, "tensorrt.")
        return OnnxRuntimeEngine.read_signature(path, {})

    @property
    def buckets(self) -> tuple[int, ...]:
        """Powers of two where model.toml names none: shapes, and CUDA graphs, are to be few."""
        return self.options.buckets or tuple(sizes(self.options.max_batch_size, ()))

    def load(self) -> None:
        spec = self.options.spec
        if spec is None:
            raise ConfigError("engine 'tensorrt' was given no model of a repository")
        try:
            from inferq.workers.cuda import device  # noqa: PLC0415
            from inferq.workers.trt.flavours import find_flavour  # noqa: PLC0415
            from inferq.workers.trt.lanes import open_lanes  # noqa: PLC0415
            from inferq.workers.trt.plans import PlanFolder  # noqa: PLC0415
        except ImportError as problem:
            raise ConfigError(
                f"engine 'tensorrt' needs a GPU, its driver and PyCUDA ({problem}); expected: "
                "pip install 'inferq[tensorrt]' (`inferq worker --cpu` serves on the CPU)"
            ) from problem
        flavour, folder = find_flavour(self._table.flavour), PlanFolder()
        self._device = device.acquire()
        try:
            plan = self._plan(spec, flavour, self._device, folder)
            with self._device:
                self._loaded = flavour.deserialize(plan.load())
                open_lanes(
                    self._device, self._loaded, self._lanes,
                    count=self.options.lanes or LANES,
                    buckets=self.buckets,
                    # With both, TensorRT would capture what is being captured.
                    own_graphs=self._table.cuda_graphs and flavour.has_own_graphs,
                    cuda_graphs=self._table.cuda_graphs and not flavour.has_own_graphs,
                )  # fmt: skip
            if not plan.record.verified:
                self._verify(spec, plan, folder)
        except BaseException:
            self.close()
            raise

    @property
    def lanes(self) -> Sequence[Lane]:
        return self._lanes

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []
        if self._device is not None:
            from inferq.workers.cuda import device  # noqa: PLC0415

            with self._device:
                self._loaded = None
            self._device = None
            device.release()

    def _plan(self, spec: ModelSpec, flavour: Flavour, gpu: Device, folder: PlanFolder) -> Plan:
        from inferq.workers.trt.builder import Order, ensure_plan  # noqa: PLC0415

        order = Order(spec, flavour, self._table.precision, capability=gpu.capability)
        with gpu:  # a build measures kernels on it
            return ensure_plan(order, folder)

    def _verify(self, spec: ModelSpec, plan: Plan, folder: PlanFolder) -> None:
        """Compare it with ONNX Runtime on its first lane, and note that. ConfigError."""
        from inferq.workers.trt.verify import make_samples, verify  # noqa: PLC0415

        lane = self._lanes[0]

        def run(inputs: Tensors) -> Mapping[str, Array]:
            rows = len(next(iter(inputs.values()))) if spec.batchable else 1
            return lane.run(Batch([inputs], rows, rows, spec.batchable))

        samples = make_samples(spec, plan.record.key.ranges)
        error = verify(run, spec, samples, precision=self._table.precision)
        folder.verified(plan, error)
        logger.info("%s: differs from ONNX Runtime by %.2g at most", spec.name, error)
