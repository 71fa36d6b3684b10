"""How many lanes a CPU bears."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from inferq.workers.process import shares

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and its container's quota rounded up.

    Several processes that share a device share these, too.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_MAX.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # No cgroup v2: no quota that could be known.
    return max(1, shares.share(cores))
