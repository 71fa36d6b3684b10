"""A worker process is pinned before anything that it imports can look for a GPU."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.workers.cuda.gpus import VISIBLE, Gpu, gpu_at, visible_as

logger = logging.getLogger(__name__)

#: Modules that look for devices when they please, and do so once.
CUDA_MODULES: Final = ("cuda", "cupy", "pycuda", "tensorrt", "tensorrt_rtx", "torch")
#: One entry a thread.
_THREADS: Final = Path("/proc/self/task")


def environment_of(gpu: Gpu) -> dict[str, str]:
    """What pins a worker process to `gpu`, if it is there from the start. ConfigError."""
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        VISIBLE: visible_as(gpu),
        "INFERQ_GPU": str(gpu.index),
    }


def pin(settings: Settings) -> None:
    """Leave this process the GPU that `settings` names and the cores near it; none on the CPU.

    ConfigError: there is no such GPU, or something has looked for devices already.
    """
    if settings.device == "cpu":
        if settings.gpu is not None:
            raise ConfigError(
                f"INFERQ_DEVICE is 'cpu' and INFERQ_GPU is {settings.gpu}; expected one of them"
            )
        os.environ[VISIBLE] = ""  # nothing can take memory of a GPU by the way
        return
    if settings.gpu is None:
        return
    gpu = gpu_at(settings.gpu)
    wanted = environment_of(gpu)
    early = [name for name in CUDA_MODULES if name in sys.modules]
    if early and any(os.environ.get(name) != value for name, value in wanted.items()):
        raise ConfigError(
            f"INFERQ_GPU is {gpu.index}, but {', '.join(early)} is imported already; expected "
            f"{VISIBLE}={wanted[VISIBLE]} in the environment, or no such import before the worker's"
        )
    os.environ.update(wanted)
    cores = gpu.cores & os.sched_getaffinity(0)
    if cores:
        _bind(cores)
    near = f"bound to {len(cores)} cores near it" if cores else "the cores near it are not known"
    part = f", {wanted[VISIBLE]} of its {len(gpu.mig)} MIG devices" if gpu.mig else ""
    logger.info("pinned to GPU %d, %s%s; %s", gpu.index, gpu.name, part, near)


def _bind(cores: Set[int]) -> None:
    """All threads that there are; those to come inherit it."""
    for thread in os.listdir(_THREADS):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)
