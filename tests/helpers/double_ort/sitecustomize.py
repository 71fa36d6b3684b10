"""On a worker's PYTHONPATH: ONNX Runtime as a build that has CUDA. It computes on the CPU.

Each run of a session with the CUDA provider runs a kernel that does nothing on the fake driver
(see fakecuda), and raises its error as text, as ONNX Runtime does.
"""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_RealSession: Any = ort.InferenceSession


class _Session(_RealSession):  # type: ignore[misc]
    def __init__(self, path: str, options: Any, providers: Sequence[Any]) -> None:
        super().__init__(path, options, providers=[_CPU])
        self._on_cuda = len(providers) > 1

    def get_providers(self) -> list[str]:
        return [_CUDA, _CPU] if self._on_cuda else [_CPU]

    def run(self, names: Any, inputs: Any, *rest: Any) -> Any:
        if self._on_cuda and (code := _run_kernel()):
            raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure {code}")
        return super().run(names, inputs, *rest)


def _run_kernel() -> int:
    from helpers.fakecuda.control import Control  # noqa: PLC0415 - the driver counts from here on

    cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    code: int = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    if code:
        return code
    cuda.cuCtxPushCurrent_v2(context)
    code = Control().launch(0) or int(cuda.cuCtxSynchronize())
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    return code


ort.InferenceSession = _Session
ort.get_available_providers = lambda: [_CUDA, _CPU]
