"""All that is used of TensorRT's API, by name, so that tests can check it against a release.

`flavours`, `network`, `running` and `logs` are the modules that name anything of it; everything
else knows theirs alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

TENSORRT: Final = "tensorrt"
RTX: Final = "tensorrt-rtx"
#: Flavour → the module it is imported from, in the order in which "auto" tries them.
MODULES: Final[Mapping[str, str]] = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}

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
        "device_memory_size_v2", "num_aux_streams", "create_runtime_config",
        "create_execution_context",
    ),
    "IRuntimeConfig": ("set_execution_context_allocation_strategy",),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "TensorIOMode": ("INPUT",),
    "DataType": ("FLOAT", "HALF", "INT8", "INT32", "INT64", "UINT8", "BOOL"),
    "IExecutionContext": (
        "set_optimization_profile_async", "set_device_memory", "set_aux_streams",
        "set_input_shape", "infer_shapes", "get_tensor_shape", "set_tensor_address",
        "execute_async_v3",
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
            "dynamic_shapes_kernel_specialization_strategy",
        ),
        "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
        "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
        "IRuntimeCache": ("serialize", "deserialize"),
    },
}  # fmt: skip

#: TensorRT's element types → NumPy's; others do not travel in requests.
DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip


def used(flavour: str) -> dict[str, tuple[str, ...]]:
    """Class → all names that are used of it in `flavour`."""
    only = USED_ONLY[flavour]
    return {
        name: (*USED.get(name, ()), *only.get(name, ())) for name in dict.fromkeys([*USED, *only])
    }
