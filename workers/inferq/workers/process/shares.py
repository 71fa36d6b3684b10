"""How many worker processes share this one's device and host: each takes one part of so many.

`inferq worker --processes` starts them, and tells each by its environment. What is shared out:
cores (engines/cores.py), memory for requests (data_plane/budget.py), the host's memory for batches
(warmup/forecast.py) and the device's (cuda/memory_share.py).
"""

from __future__ import annotations


class _Sharing:
    """Of this process, for good."""

    processes = 1


def share_with(processes: int) -> None:
    """From now on this process is one of so many. Before anything asks."""
    _Sharing.processes = processes


def processes() -> int:
    """This one included."""
    return _Sharing.processes


def share(whole: int) -> int:
    """One process' part of `whole`."""
    return whole // _Sharing.processes
