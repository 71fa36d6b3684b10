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

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from inferq.shared.errors import ConfigError
from inferq.workers.engines.on_gpu import LANES, ROUNDING, WARM_RUNS, further_lanes, gpu_buckets
from inferq.workers.models.engine import Engine, LoadedModel
from inferq.workers.models.ranges import optimum_inputs
from inferq.workers.models.signatures import Declared
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import Flag, TomlTable, validate


class _Table(TomlTable):
    """``[tensorrt]``."""

    flavour: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    precision: Literal["fp32", "fp16"] = "fp32"
    cuda_graphs: Flag = True


class TensorRTEngine(Engine):
    """Opens one plan, with an execution context for each lane."""

    name = "tensorrt"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = validate(_Table, spec.engine_table, "tensorrt.")

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        """As ONNX Runtime reads it from the same file, on the CPU."""
        from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine  # noqa: PLC0415

        validate(_Table, table, "tensorrt.")
        return OnnxRuntimeEngine.read(path, {})

    def load(self) -> LoadedModel:
        try:
            from inferq.workers.trt.flavours import find_flavour  # noqa: PLC0415
            from inferq.workers.trt.session import opened_session  # noqa: PLC0415
        except ImportError as problem:
            driver = "libcuda" in str(problem)
            todo = "NVIDIA's driver" if driver else "pip install 'inferq[tensorrt]'"
            raise ConfigError(
                f"engine 'tensorrt' needs a GPU, its driver and PyCUDA ({problem}); expected: "
                f"{todo} (`inferq worker --cpu` serves on the CPU)"
            ) from problem
        spec, table = self.spec, self._table
        buckets = gpu_buckets(spec)
        with ExitStack() as stack:
            session = stack.enter_context(
                opened_session(
                    spec,
                    find_flavour(table.flavour),
                    table.precision,
                    lanes=spec.config.lanes or LANES,
                    buckets=buckets,
                    graphs=table.cuda_graphs,
                )
            )
            return LoadedModel(
                spec,
                "cuda",
                session.lanes,
                buckets=buckets,
                optimum=optimum_inputs(spec),
                rounding=ROUNDING,
                runs_to_be_warm=WARM_RUNS,
                further_lanes=further_lanes(spec, session.another),
                warmed_up=session.keep_compiled,
                free=stack.pop_all().close,
            )
