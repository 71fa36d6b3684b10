"""Checks this host: its GPUs and installed packages. It imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

from inferq.shared.errors import InferqError
from inferq.workers.cuda.gpus import select
from inferq.workers.doctor.finding import Finding, error, ok, warning

#: Exists if the kernel has NVIDIA's driver.
DRIVER: Final = Path("/proc/driver/nvidia/version")
#: Packages that every client and worker needs.
NEEDED: Final = ("celery", "kombu", "redis")
#: Packages that run models: distribution names, the extra that installs them, and their purpose.
OPTIONAL: Final = (
    (("onnxruntime", "onnxruntime-gpu"), "worker", "workers"),
    (("torch",), "torch", "engine torch"),
    (("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt", "engine tensorrt"),
    (("tensorrt-rtx", "tensorrt-rtx-cu13"), "tensorrt-rtx", "engine tensorrt, flavour rtx"),
    (("pycuda",), "tensorrt", "engine tensorrt"),
    (("flower",), "flower", "inferq flower"),
)


def gpus(asked_for: int | None) -> Iterator[Finding]:
    """The GPUs that workers here may use. `asked_for`: the one that INFERQ_GPU names."""
    try:
        found = select("all" if asked_for is None else str(asked_for))
    except InferqError as problem:
        if asked_for is not None:
            yield error("gpu", f"INFERQ_GPU is {asked_for}: {problem.message}", "unset INFERQ_GPU")
        elif DRIVER.exists():
            yield warning(
                "gpu", f"there is an NVIDIA driver, but {problem.message}", "see the message"
            )
        else:
            yield ok("gpu", f"none: models run on the CPU ({problem.message})")
        return
    for gpu in found:
        memory = f", {gpu.memory_bytes / 1e9:.0f} GB" if gpu.memory_bytes is not None else ""
        capability = ".".join(map(str, gpu.compute_capability))
        yield ok("gpu", f"{gpu.index}: {gpu.name}{memory}, compute capability {capability}")


def tensorrt_lacks() -> tuple[str, str] | None:
    """Why the engine tensorrt cannot run on this host, and what to do; None: it can."""
    try:
        select("all")
    except InferqError as problem:
        todo = "serve it where there is a GPU, or on the CPU: inferq worker --cpu"
        return f"no GPU ({problem.message})", todo
    flavours = [name for names, *_ in OPTIONAL if names[0].startswith("tensorrt") for name in names]
    lacking = [] if any(_installed(name) for name in flavours) else ["tensorrt"]
    lacking += [] if _installed("pycuda") else ["pycuda"]
    if lacking:
        return f"{' and '.join(lacking)} not installed", 'pip install "inferq[tensorrt]"'
    return None


def packages() -> Iterator[Finding]:
    """The versions of what inferq is built on."""
    bounds = _bounds()
    for name in NEEDED:
        check = f"package {name}"
        installed = _installed(name)
        low, high = bounds.get(name, ((), ()))
        if installed is None:
            yield error(check, "not installed", "pip install inferq")
        elif _numbers(installed) < low or (high and _numbers(installed) >= high):
            wanted = f">={_dotted(low)}" + (f",<{_dotted(high)}" if high else "")
            yield error(check, f"{installed}; expected {wanted}", f'pip install "{name}{wanted}"')
        else:
            yield ok(check, installed)
    for names, extra, purpose in OPTIONAL:
        check = f"package {names[0]}"
        present = [f"{name} {found}" for name in names if (found := _installed(name)) is not None]
        install = f'pip install "inferq[{extra}]"'
        if present:
            yield ok(check, ", ".join(present).removeprefix(f"{names[0]} "))
        elif extra == "worker":
            yield warning(check, f"not installed: needed by {purpose}", install)
        else:
            yield ok(check, f"not installed: only for {purpose}: {install}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _bounds() -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Package → the first version that inferq accepts, and the first that it does not."""
    found = {}
    try:
        lines = requires("inferq") or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        name = re.match(r"[A-Za-z0-9_.\-]+", line)
        if name is None or "extra ==" in line:
            continue
        low = re.search(r">=([\d.]+)", line)
        high = re.search(r"<([\d.]+)", line)
        found[name.group()] = (
            _numbers(low.group(1)) if low else (),
            _numbers(high.group(1)) if high else (),
        )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
