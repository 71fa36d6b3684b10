"""What ``[onnxruntime]`` of model.toml may say, and what ONNX Runtime is told by it.

[onnxruntime]
provider = "auto"                   # "cpu", "cuda"; auto: CUDA where there is one
intra_op_num_threads = 1            # of one run; the fewer lanes, the more there are
inter_op_num_threads = 1
execution_mode = "sequential"       # "parallel"
graph_optimization_level = "all"    # "disable", "basic", "extended"
arena = "on"                        # "off"; "shrink": what a run leaves is given back
mem_pattern = false
custom_ops = []                     # libraries of operators: files, or packages that have one

[onnxruntime.provider_options]      # of CUDA
gpu_mem_limit = 2_000_000_000
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

# Official builds since 1.29 report what they run to their maker unless this is set beforehand.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from pydantic import Field

from inferq.shared.errors import ConfigError
from inferq.workers.cuda import memory_share
from inferq.workers.models.validation import Flag, Text, TomlTable

#: Log errors only; warnings about every unused initialiser are of no use to who serves the model.
_LOG_ERRORS: Final = 3
_LEVELS: Final = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_MODES: Final = {
    "sequential": ort.ExecutionMode.ORT_SEQUENTIAL,
    "parallel": ort.ExecutionMode.ORT_PARALLEL,
}
#: Of a run: gives back the arena's memory that is free at its end.
_SHRINK: Final = "memory.enable_memory_arena_shrinkage"

Threads = Annotated[int, Field(strict=True, ge=1, le=256)]


class CudaOptions(TomlTable):
    """``[onnxruntime.provider_options]``: what model.toml leaves open is not passed on."""

    device_id: Annotated[int, Field(strict=True, ge=0, le=255)] | None = None
    #: Bytes.
    gpu_mem_limit: Annotated[int, Field(strict=True, ge=1 << 20, le=1 << 44)] | None = None
    arena_extend_strategy: Literal["kNextPowerOfTwo", "kSameAsRequested"] | None = None
    cudnn_conv_algo_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] | None = None
    cudnn_conv_use_max_workspace: Flag | None = None
    do_copy_in_default_stream: Flag | None = None
    use_tf32: Flag | None = None
    prefer_nhwc: Flag | None = None


class Table(TomlTable):
    """``[onnxruntime]``."""

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    intra_op_num_threads: Threads = 1
    inter_op_num_threads: Threads = 1
    execution_mode: Literal["sequential", "parallel"] = "sequential"
    graph_optimization_level: Literal["disable", "basic", "extended", "all"] = "all"
    arena: Literal["on", "off", "shrink"] = "on"
    mem_pattern: Flag = False
    custom_ops: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    provider_options: CudaOptions = CudaOptions()

    @property
    def threads(self) -> int:
        """That one run keeps busy."""
        inter = self.inter_op_num_threads if self.execution_mode == "parallel" else 1
        return self.intra_op_num_threads * inter


def check(table: Table) -> None:
    """ConfigError: its knobs do not fit together."""
    if table.provider == "cpu" and table.provider_options.model_dump(exclude_none=True):
        given = ", ".join(table.provider_options.model_dump(exclude_none=True))
        raise ConfigError(
            f"onnxruntime.provider_options has {given}; expected none, as provider is 'cpu'"
        )
    if table.inter_op_num_threads > 1 and table.execution_mode == "sequential":
        raise ConfigError(
            f"onnxruntime.inter_op_num_threads is {table.inter_op_num_threads}; expected 1, or "
            'execution_mode = "parallel", without which no node runs beside another'
        )


def session_options(table: Table, path: Path | None) -> ort.SessionOptions:
    """Of a session of the model in `path`. ConfigError: a library of operators is not there."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = table.intra_op_num_threads
    options.inter_op_num_threads = table.inter_op_num_threads
    options.execution_mode = _MODES[table.execution_mode]
    options.graph_optimization_level = _LEVELS[table.graph_optimization_level]
    options.log_severity_level = _LOG_ERRORS
    # A plan of memory for each shape is no faster here, keeps a block of its own for each batch
    # size (a third of all memory in service), and is never forgotten.
    options.enable_mem_pattern = table.mem_pattern
    options.enable_cpu_mem_arena = table.arena != "off"
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    for place, name in enumerate(table.custom_ops):
        library = _library(f"onnxruntime.custom_ops.{place}", name, path)
        try:
            options.register_custom_ops_library(library)
        except Exception as problem:
            raise ConfigError(
                f"onnxruntime.custom_ops.{place} is {name!r}; expected a library of operators for "
                f"ONNX Runtime ({' '.join(str(problem).split())[:300]})"
            ) from problem
    return options


def run_options(table: Table, *, on_cuda: bool) -> ort.RunOptions | None:
    """Of each run; None: there are none."""
    if table.arena != "shrink":
        return None
    options = ort.RunOptions()
    device = table.provider_options.device_id or 0
    options.add_run_config_entry(_SHRINK, f"cpu:0;gpu:{device}" if on_cuda else "cpu:0")
    return options


def cuda_options(table: Table) -> dict[str, str]:
    """Of the CUDA provider, which takes as much memory as it likes where it is not told.

    Its own choice of algorithms, EXHAUSTIVE, tries all of cuDNN's out whenever a convolution meets
    a new shape: while a request waits, and with the memory that the greediest of them takes.
    """
    limit = memory_share.limit()
    limited = {} if limit is None else {"gpu_mem_limit": str(limit)}
    given = table.provider_options.model_dump(exclude_none=True)
    told = {name: str(int(v) if isinstance(v, bool) else v) for name, v in given.items()}
    return {"cudnn_conv_algo_search": "HEURISTIC", **limited, **told}


def _library(where: str, name: str, path: Path | None) -> str:
    """The file of the library `name`: a path, from the model's folder on, or a package's own."""
    if "/" in name or name.endswith(".so"):
        library = Path(name) if path is None else path.parent.parent / name
        if not library.is_file():
            raise ConfigError(f"{where} is {name!r}; expected a file, and {library} is none")
        return str(library)
    try:
        module: Any = importlib.import_module(name)
        found = module.get_library_path()
    except Exception as problem:
        raise ConfigError(
            f"{where} is {name!r}; expected a file (with a / in it), or an installed package with "
            f"get_library_path(), as onnxruntime_extensions has it ({problem})"
        ) from problem
    return str(found)


def lacks_operators(text: str) -> str:
    """What to add to what ONNX Runtime says of a model: how it is given operators that it lacks."""
    lacking = "is not a registered function/op" in text or "No Op registered for" in text
    return (
        "; custom_ops in [onnxruntime] of model.toml names the library of its operators, as in "
        'custom_ops = ["onnxruntime_extensions"]'
        if lacking
        else ""
    )
