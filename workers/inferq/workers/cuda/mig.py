"""MIG: a GPU that is divided into devices of their own, each with a UUID, compute and memory.

A GPU in MIG mode cannot be used as a whole, and a process sees one MIG device of all that there are
(NVIDIA's MIG user guide, "CUDA Device Enumeration"). A container that was given some of them may
not ask the GPU itself for its memory or load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

#: How the name of a MIG device begins, in CUDA_VISIBLE_DEVICES and as NVML tells it.
PREFIX: Final = "MIG-"


def handles(nvml: Any, gpu: Any) -> Iterator[Any]:
    """NVML's handles of the MIG devices of the GPU with the handle `gpu`. NVMLError."""
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except nvml.NVMLError:  # none has this number, or none that we may use
            continue


def uuids(nvml: Any, gpu: Any) -> tuple[str, ...] | None:
    """Of its MIG devices; None if it is not in MIG mode, as far as it tells."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(gpu)
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
        return tuple(text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles(nvml, gpu))
    except nvml.NVMLError:
        return None


def handle_of(nvml: Any, gpu: Any, uuid: str) -> Any | None:
    """NVML's handle of the MIG device `uuid` of that GPU; None if it has no such device."""
    try:
        for handle in handles(nvml, gpu):
            if text(nvml.nvmlDeviceGetUUID(handle)) == uuid:
                return handle
    except nvml.NVMLError:
        pass
    return None


def is_of(entry: str, gpu: str, devices: Sequence[str]) -> bool:
    """Whether `entry` of CUDA_VISIBLE_DEVICES names one of the `devices` of the GPU `gpu` (UUIDs).

    The beginning of a UUID will do. Drivers before R470: ``MIG-<GPU's UUID>/<number>/<number>``.
    """
    if any(device.startswith(entry) for device in devices):
        return True
    return bool(gpu) and entry.startswith(f"{PREFIX}{gpu}/")


def text(value: str | bytes) -> str:
    """What NVML tells; older packages tell bytes."""
    return value.decode() if isinstance(value, bytes) else value
