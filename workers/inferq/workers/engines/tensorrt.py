"""Runs ONNX files as TensorRT plans, on lanes of a CUDA device.

    [tensorrt]
    flavour = "auto"                 # "tensorrt", "tensorrt-rtx"; auto: what is installed
    precision = "fp32"               # "fp16": inner tensors; inputs and outputs stay as they are
    cuda_graphs = true

The plan comes from the plan cache, or is built when the model is loaded (`inferq build` does that
beforehand). A plan that was built without a GPU is compared with ONNX Runtime before it serves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from inferq.shared.errors import ConfigError, EngineError
from inferq.shared.schema import Signature
from inferq.workers.cuda import device
from inferq.workers.cuda.buffers import nbytes
from inferq.workers.cuda.lane import CudaLane, RowLimit, Shape
from inferq.workers.engines.base import Engine, EngineOptions, Lane
from inferq.workers.trt.flavours import Context, Loaded, find_flavour
from inferq.workers.tuning import sizes
from inferq.workers.validation import Flag, TomlTable, validate

logger = logging.getLogger(__name__)

#: One lane's copies hide behind the other's compute.
LANES: Final = 2
_MB: Final = 1e6


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
        self._device: device.Device | None = None
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
        flavour = find_flavour(self._table.flavour)
        self._device = device.acquire()
        try:
            plan = self._plan(flavour)
            with self._device:
                self._loaded = flavour.deserialize(plan)
                self._open_lanes(self._device, self._loaded)
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
            with self._device:
                self._loaded = None
            self._device = None
            device.release()

    def _open_lanes(self, gpu: device.Device, loaded: Loaded) -> None:
        inputs = {tensor.name: tensor.dtype.name for tensor in loaded.tensors if tensor.is_input}
        outputs = {t.name: t.dtype.name for t in loaded.tensors if not t.is_input}
        largest = {name: loaded.range(name).max for name in inputs}
        count, limit = self.options.lanes or LANES, RowLimit()
        executors: list[_Executor] = []
        for number in range(count):
            self._check_memory(gpu, count, number, loaded.context_bytes)
            graphs = self._table.cuda_graphs
            executors.append(_Executor(loaded.context(graphs=graphs), list(outputs)))
            if not number:
                shapes = {**largest, **executors[0].set_shapes(largest)}
                buffers = sum(nbytes(t.dtype.name, shapes[t.name]) for t in loaded.tensors)
                each = buffers + loaded.context_bytes
                logger.info(
                    "%d lanes of %.0f MB each: %.0f MB of buffers, %.0f MB of TensorRT's; %.0f MB "
                    "of the GPU are free", count, each / _MB, buffers / _MB,
                    loaded.context_bytes / _MB, gpu.memory()[0] / _MB,
                )  # fmt: skip
                self._check_memory(gpu, count, 0, each, taken=loaded.context_bytes)
        for executor in executors:
            self._lanes.append(
                CudaLane(
                    gpu, executor, inputs, outputs, largest, limit,
                    bucket=self._bucket,
                    graphs=graphs and not loaded.captures_graphs,
                )
            )  # fmt: skip

    def _bucket(self, rows: int) -> int:
        return next((size for size in self.buckets if size >= rows), rows)

    def _check_memory(
        self, gpu: device.Device, lanes: int, opened: int, each: int, taken: int = 0
    ) -> None:
        """ConfigError unless the lanes that are still to be opened, of `each` bytes, fit."""
        free, total = gpu.memory()
        wanted = (lanes - opened) * each - taken
        if wanted <= free:
            return
        fit = opened + (free + taken) // each
        rows = self.options.max_batch_size * (free + taken) // ((lanes - opened) * each)
        advice = [f"lanes = {fit}"] if fit else []
        advice += [f"max_batch_size = {rows}"] if rows else []
        raise ConfigError(
            f"{lanes} lanes take {each / _MB:.0f} MB each and {free / _MB:.0f} of {total / _MB:.0f}"
            f" MB of the GPU are free; {' or '.join(advice) or 'nothing less'} would fit"
        )


class _Executor:
    """One execution context."""

    def __init__(self, context: Context, outputs: Sequence[str]) -> None:
        self._context: Context | None = context
        self._outputs = outputs

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        context = self._open
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        context.infer_shapes()
        found = {name: context.shape(name) for name in self._outputs}
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the data")
        return found

    def set_address(self, name: str, address: int) -> None:
        self._open.set_address(name, address)

    def enqueue(self, stream: int) -> None:
        self._open.execute(stream)

    def close(self) -> None:
        self._context = None

    @property
    def _open(self) -> Context:
        if self._context is None:
            raise EngineError("the lane is closed")
        return self._context
