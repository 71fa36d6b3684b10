"""The GPUs of this host, asked of the driver through NVML, which makes no CUDA context."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from inferq.shared.errors import ConfigError
from inferq.workers.cuda import mig
from inferq.workers.cuda.mig import text

#: How each message about a GPU that cannot be had ends.
INSTEAD: Final = "`inferq worker --cpu` serves on the CPU"
#: Where the kernel tells which cores are near a device.
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
#: CUDA's own variable: the devices that a process may see.
VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """One physical GPU; `index` counts in PCI order, as nvidia-smi does."""

    index: int
    uuid: str
    name: str
    #: As the kernel writes it: ``0000:3b:00.0``.
    pci_bus_id: str
    #: None: not told, as where it shares the host's memory, or a container was given a part of it.
    memory_bytes: int | None
    compute_capability: tuple[int, int]
    #: Cores of the NUMA node that it is attached to; empty: not known.
    cores: frozenset[int]
    #: UUIDs of the MIG devices that it is divided into; None: it is not divided.
    mig: tuple[str, ...] | None = None


def gpu_at(index: int) -> Gpu:
    """The GPU `index`. ConfigError: no driver, no such GPU."""
    with _nvml() as nvml:
        return _read(nvml, index, _count(nvml))


def select(given: str) -> list[Gpu]:
    """The GPUs that ``--gpu`` names: a number, several with commas, or all. ConfigError.

    ``all`` are those that CUDA_VISIBLE_DEVICES leaves, if it is set; a number that it leaves out is
    refused.
    """
    indices = None if given.strip() == "all" else _numbers(given)
    with _nvml() as nvml:
        count = _count(nvml)
        found = [_read(nvml, i, count) for i in (range(count) if indices is None else indices)]
    if indices is not None:
        for gpu in found:
            visible_as(gpu)
        return found
    left = [gpu for gpu in found if _is_visible(gpu)]
    if not left:
        raise ConfigError(
            f"{VISIBLE} is {os.environ[VISIBLE]!r}, which leaves no GPU of this host; "
            f"expected it unset; {INSTEAD}"
        )
    return left


def visible_as(gpu: Gpu) -> str:
    """What CUDA_VISIBLE_DEVICES must be in a process that is pinned to `gpu`: its UUID.

    Of a GPU that is divided it is a MIG device's: the first that is named there already, or else
    its first. ConfigError if what is there leaves `gpu` out, or there is no such device.
    """
    if not _is_visible(gpu):
        raise ConfigError(
            f"{VISIBLE} is {os.environ[VISIBLE]!r}, which leaves out GPU {gpu.index}; "
            f"expected it unset or {gpu.uuid}; {INSTEAD}"
        )
    devices = gpu.mig or ()
    entries = [entry.strip() for entry in os.environ.get(VISIBLE, "").split(",")]
    named = [entry for entry in entries if entry.startswith(mig.PREFIX)]
    for entry in named:
        for device in devices:
            if device.startswith(entry):
                return device
    if named:  # as drivers before R470 have it, or as NVML does not tell it here
        return next((entry for entry in named if mig.is_of(entry, gpu.uuid, ())), named[0])
    if gpu.mig is None:
        return gpu.uuid
    if not devices:
        raise ConfigError(
            f"GPU {gpu.index} is in MIG mode and has no MIG device here; expected one "
            f"(`nvidia-smi mig -cgi … -C`, or a container that was given one); {INSTEAD}"
        )
    return devices[0]


def open_nvml() -> Any:
    """NVML's module, initialised; its `nvmlShutdown` ends that. ConfigError: what is missing."""
    try:
        import pynvml  # noqa: PLC0415 - only where a GPU is asked for
    except ImportError:
        raise ConfigError(
            "no GPU can be used: the package nvidia-ml-py is not installed; expected: "
            f'pip install "inferq[tensorrt]"; {INSTEAD}'
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        raise ConfigError(f"no GPU can be used: {_missing(pynvml, problem)}; {INSTEAD}") from None
    return pynvml


@contextmanager
def _nvml() -> Iterator[Any]:
    nvml = open_nvml()
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _missing(nvml: Any, problem: Exception) -> str:
    if isinstance(problem, nvml.NVMLError_LibraryNotFound):
        return (
            "no NVIDIA driver is found (libnvidia-ml.so.1); install it "
            "(or start the container with its GPUs: --gpus all)"
        )
    if isinstance(problem, nvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is not loaded; load it (modprobe nvidia)"
    if isinstance(problem, nvml.NVMLError_NoPermission):
        return (
            "this process may not talk to the NVIDIA driver; let its user use /dev/nvidiactl "
            "(or start the container with its GPUs: --gpus all)"
        )
    return f"the NVIDIA driver does not answer ({problem}); see what nvidia-smi says"


def _numbers(given: str) -> list[int]:
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ConfigError(
            f"gpu is {given!r}; expected a GPU's number, several with commas (0,1), or all"
        )
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"gpu is {given!r}; expected each GPU once: one worker process serves it")
    return numbers


def _count(nvml: Any) -> int:
    count = int(nvml.nvmlDeviceGetCount())
    if not count:
        raise ConfigError(
            f"no GPU can be used: the NVIDIA driver finds none; see what nvidia-smi says; {INSTEAD}"
        )
    return count


def _read(nvml: Any, index: int, count: int) -> Gpu:
    if index >= count:
        known = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigError(f"gpu is {index}; expected {known} on this host; {INSTEAD}")
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        bus_id = _kernels_bus_id(nvml.nvmlDeviceGetPciInfo(handle).busId)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Gpu(
            index=index,
            uuid=text(nvml.nvmlDeviceGetUUID(handle)),
            name=text(nvml.nvmlDeviceGetName(handle)),
            pci_bus_id=bus_id,
            memory_bytes=_memory_bytes(nvml, handle),
            compute_capability=(int(major), int(minor)),
            cores=_near_cores(bus_id),
            mig=mig.uuids(nvml, handle),
        )
    except nvml.NVMLError_NoPermission as problem:
        raise ConfigError(
            f"GPU {index} may not be asked ({problem}); expected a user or a container that was "
            f"given it; {INSTEAD}"
        ) from None
    except nvml.NVMLError as problem:
        raise ConfigError(
            f"GPU {index} does not answer ({problem}); see what nvidia-smi says; {INSTEAD}"
        ) from None


def _memory_bytes(nvml: Any, handle: Any) -> int | None:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
        return None


def _kernels_bus_id(bus_id: str | bytes) -> str:
    """NVML writes the domain with 8 digits, and all of it in capitals."""
    domain, _, rest = text(bus_id).lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def _near_cores(bus_id: str) -> frozenset[int]:
    try:
        return parse_cores((PCI_DEVICES / bus_id / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def parse_cores(text: str) -> frozenset[int]:
    """The kernel's list of cores: ``0-3,8,10-11``. ValueError if it is none."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def _is_visible(gpu: Gpu) -> bool:
    given = os.environ.get(VISIBLE)
    if given is None:
        return True
    with _nvml() as nvml:
        uuids, parts = zip(*(_uuids(nvml, index) for index in range(_count(nvml))), strict=True)
    return gpu.index in visible_indices(given, uuids, parts)


def visible_indices(
    given: str, uuids: Sequence[str], parts: Sequence[Sequence[str]] = ()
) -> frozenset[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES = `given` leaves, of those with `uuids`, in PCI order.

    As the CUDA programming guide has it ("CUDA Environment Variables"): numbers, or UUIDs, of which
    the beginning will do if no other GPU's begins alike; the first entry that is neither ends the
    list. `parts`: the UUIDs of each GPU's MIG devices. One that is none of these may be of any GPU.
    """
    found: set[int] = set()
    each = list(zip(uuids, parts or [()] * len(uuids), strict=True))
    for entry in (part.strip() for part in given.split(",")):
        if entry.startswith(mig.PREFIX):
            owners = {n for n, (uuid, own) in enumerate(each) if mig.is_of(entry, uuid, own)}
            found |= owners or set(range(len(uuids)))
        elif (index := _index_of(entry, uuids)) is not None:
            found.add(index)
        else:
            break
    return frozenset(found)


def _index_of(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.startswith("GPU-"):
        same = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        return same[0] if len(same) == 1 else None
    is_number = entry.isascii() and entry.isdigit() and len(entry) < 10
    return int(entry) if is_number and int(entry) < len(uuids) else None


def _uuids(nvml: Any, index: int) -> tuple[str, tuple[str, ...]]:
    """Its own, and its MIG devices'; empty if it does not answer: its number names it then."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return text(nvml.nvmlDeviceGetUUID(handle)), mig.uuids(nvml, handle) or ()
    except nvml.NVMLError:
        return "", ()
