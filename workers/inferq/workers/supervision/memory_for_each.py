"""Whether the host's memory is enough for a worker process on each GPU.

A container's limit is for all processes in it, and easily set with one in mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from inferq.workers.warmup.limits import Limit, limits

#: Bytes below which one process has no room for CUDA's and an engine's libraries, pinned memory,
#: and the requests that it holds. An estimate: it was not measured on a card.
LEAST_BYTES: Final = 2 << 30
_GB: Final = 1e9


def too_little(processes: int, known: Sequence[Limit] | None = None) -> str | None:
    """What to say to who starts so many processes on GPUs; None: there is enough, or one alone."""
    resident = [
        limit for limit in (limits() if known is None else known) if limit.gauge == "resident"
    ]
    least = min(resident, key=lambda limit: limit.limit, default=None)
    if processes < 2 or least is None or least.limit >= processes * LEAST_BYTES:
        return None
    return (
        f"{processes} worker processes share {least.limit / _GB:.1f} GB of memory, the limit of "
        f"{least.name}: {least.limit / processes / _GB:.1f} GB for each; expected at least "
        f"{LEAST_BYTES / _GB:.1f} GB for each: raise the container's limit, or serve on fewer GPUs"
    )
