"""NVIDIA's Multi-Process Service, by which kernels of several processes run on a GPU side by side.

Without it they take turns. CUDA finds it by itself, through the folder that CUDA_MPS_PIPE_DIRECTORY
names, or /tmp/nvidia-mps. Here it is only noticed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

FOLDER: Final = "CUDA_MPS_PIPE_DIRECTORY"
_DAEMON: Final = "nvidia-cuda-mps-control"
_PROC: Final = Path("/proc")


def noticed(environment: Mapping[str, str]) -> str | None:
    """By what it is noticed; None: by nothing."""
    folder = environment.get(FOLDER)
    if folder:
        missing = "" if os.path.isdir(folder) else ", which is no folder: CUDA works without it"
        return f"{FOLDER} is {folder}{missing}"
    pid = _daemon(_PROC)
    return None if pid is None else f"{_DAEMON} is process {pid}"


def _daemon(proc: Path) -> str | None:
    try:
        pids = sorted((entry for entry in os.listdir(proc) if entry.isdecimal()), key=int)
    except OSError:
        return None
    for pid in pids:
        try:
            program = (proc / pid / "cmdline").read_bytes().split(b"\0", 1)[0]
        except OSError:  # it has ended, or is hidden from us
            continue
        if os.path.basename(program) == _DAEMON.encode():
            return pid
    return None
