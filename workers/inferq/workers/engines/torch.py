"""Runs programs that torch.export wrote (``model.pt2``) on PyTorch.

    engine = "torch"
    [torch]
    device = "auto"                  # "cpu", "cuda"; auto: the CPU
    cuda_graphs = true

On a CUDA device the lanes are as the TensorRT engine's (see torch_cuda). On the CPU one program is
shared by all lanes, one lane a usable core, one thread a lane. PyTorch's operators release the GIL
and what calls them does not (measured: 2 µs an operator and 20 µs a run): lanes multiply the
throughput of models whose operators take longer than that; to tiny ones ``lanes = 1`` is kinder.

A model is as good as code, and comes from the repository only. Reading a .pt2 executes what its
graph says: sizes are evaluated as Python expressions, and operators are looked up by name. What
would execute more than that is refused before the file is loaded, since no model that
``torch.export.save`` writes of plain tensors needs it: pickled weights and objects, compiled
libraries, the older format. Examples of inputs are read by PyTorch's restricted unpickler alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from inferq.shared.errors import ConfigError, EngineError
from inferq.shared.schema import DTYPES, Array, Tensors
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.on_gpu import LANES, ROUNDING, WARM_RUNS, further_lanes, gpu_buckets
from inferq.workers.engines.pt2 import check_archive
from inferq.workers.engines.torch_program import FlatFunction, Layout, flat_function, read_layout
from inferq.workers.models.engine import (
    Batch,
    Engine,
    Lane,
    LoadedModel,
    check_inputs,
    gather,
    reason,
    without_padding,
)
from inferq.workers.models.ranges import given_optimum_inputs, optimum_inputs
from inferq.workers.models.signatures import Declared
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import Flag, TomlTable, validate
from inferq.workers.process import shares

# Inputs may be views of a message, which nobody may write to; a program that would is given copies.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class _Table(TomlTable):
    """``[torch]``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graphs: Flag = True


class TorchEngine(Engine):
    """Opens one exported program, which the lanes share."""

    name = "torch"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = validate(_Table, spec.engine_table, "torch.")

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        validate(_Table, table, "torch.")
        program = _open(path)
        layout = read_layout(program)
        return Declared(layout.signature, TorchLane(flat_function(program), layout).call)

    def load(self) -> LoadedModel:
        spec = self.spec
        program = _open(spec.path)
        layout = read_layout(program)
        self._check_rows(layout)
        # A lane is a thread already.
        torch.set_num_threads(1)
        if self._table.device == "cuda":
            return self._load_on_cuda(program, layout)
        function = flat_function(program)
        return LoadedModel(
            spec,
            "cpu",
            [TorchLane(function, layout) for _ in range(spec.config.lanes or usable_cores())],
            buckets=spec.config.buckets,
            optimum=given_optimum_inputs(spec),
            parallel_lanes=True,
        )

    def _load_on_cuda(self, program: torch.export.ExportedProgram, layout: Layout) -> LoadedModel:
        if not torch.cuda.is_available():
            raise ConfigError("torch.device is 'cuda', but no CUDA device could be used")
        try:
            from inferq.workers.engines.torch_cuda import opened  # noqa: PLC0415
        except ImportError as problem:
            raise ConfigError(
                f"torch.device is 'cuda', which needs PyCUDA ({problem}); expected: "
                "pip install 'inferq[tensorrt]'"
            ) from problem
        _keep_to_share()
        spec, graphs = self.spec, self._table.cuda_graphs
        buckets, optimum = gpu_buckets(spec), optimum_inputs(spec)
        with ExitStack() as stack:
            lanes, another = stack.enter_context(
                opened(
                    program,
                    layout,
                    spec,
                    count=spec.config.lanes or LANES,
                    buckets=buckets,
                    graphs=graphs,
                )
            )
            return LoadedModel(
                spec,
                "cuda",
                lanes,
                buckets=buckets,
                optimum=optimum,
                rounding=ROUNDING,
                runs_to_be_warm=WARM_RUNS,
                further_lanes=further_lanes(spec, another),
                free=stack.pop_all().close,
            )

    def _check_rows(self, layout: Layout) -> None:
        if layout.rows is None:
            return
        least, most = layout.rows
        sizes = self.spec.config.buckets or (1,)
        if most is not None and self.spec.max_batch_size > most:
            raise ConfigError(
                f"max_batch_size is {self.spec.max_batch_size}; expected at most {most}, "
                "the largest batch that the program was exported for"
            )
        if sizes[0] < least:
            raise ConfigError(
                f"buckets is {list(self.spec.config.buckets)}; expected the first to be at least "
                f"{least}, the smallest batch that the program was exported for"
            )


class TorchLane(Lane):
    """A caller of the shared program."""

    def __init__(self, function: FlatFunction, layout: Layout) -> None:
        self._function = function
        self._layout = layout
        self._names = [spec.name for spec in layout.signature.outputs]
        self._dtypes = {spec.name: DTYPES[spec.dtype] for spec in layout.signature.inputs}

    def run(self, batch: Batch) -> Mapping[str, Array]:
        inputs = gather(batch)
        check_inputs(inputs, self._dtypes)
        try:
            outputs = self.call(inputs)
        except Exception as problem:
            raise EngineError(f"torch: {reason(problem)}") from problem
        return without_padding(batch, outputs)

    def call(self, inputs: Tensors) -> Mapping[str, Array]:
        """One run of the program on `inputs` as they are; raises what PyTorch raises."""
        leaves = [
            torch.from_numpy(_plain(inputs[leaf.name], leaf.is_written))
            if leaf.is_tensor
            else leaf.constant
            for leaf in self._layout.leaves
        ]
        with torch.inference_mode():
            answered = self._function(*leaves)
            arrays = [tensor.resolve_conj().resolve_neg().numpy() for tensor in answered]
        return dict(zip(self._names, arrays, strict=True))


def _keep_to_share() -> None:
    """Have PyTorch's allocator take this process' part of the device's memory at most."""
    if shares.processes() > 1:
        torch.cuda.set_per_process_memory_fraction(1.0 / shares.processes())


def _plain(array: Array, copied: bool) -> Array:
    """`array` as PyTorch takes it, and a copy if it will be written to."""
    if copied:
        return array.copy()
    # PyTorch knows no negative strides; other than native byte orders never reach an engine.
    return np.ascontiguousarray(array) if array.ndim else array


def _open(path: Path | None) -> torch.export.ExportedProgram:
    if path is None:
        raise ConfigError("engine 'torch' has no model file; expected model.pt2")
    check_archive(path, _is_plain_data)
    try:
        return torch.export.load(path)
    except Exception as problem:
        raise ConfigError(
            f"{path} cannot be loaded by PyTorch {torch.__version__}: {reason(problem)}"
        ) from problem


def _is_plain_data(file: Any) -> bool:
    """Whether PyTorch's restricted unpickler, which makes tensors only, reads `file`."""
    try:
        torch.load(file, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it says, the file would be unpickled without limits
        return False
    return True
