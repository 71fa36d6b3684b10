"""How many worker processes share this one's device and host: each takes one part of so many.

`inferq worker --processes` starts them, and tells each by its environment. What is shared out:
cores (engines/cores.py), memory for requests (data_plane/budget.py) and the device's
(cuda/memory_share.py); and among the processes of all devices the host's memory for batches
(warmup/forecast.py).
"""

from __future__ import annotations


class _Sharing:
    """Of this process, for good."""

    processes = 1
    on_host = 1


def share_with(processes: int, *, on_host: int | None = None) -> None:
    """From now on this process is one of so many on its device, and of `on_host` on its host; None:
    of as many. Before anything asks.
    """
    _Sharing.processes = processes
    _Sharing.on_host = max(processes, on_host or 1)


def processes() -> int:
    """This one included."""
    return _Sharing.processes


def share(whole: int) -> int:
    """One process' part of `whole`."""
    return whole // _Sharing.processes


def processes_on_host() -> int:
    """Those of all devices that `inferq worker` serves on, this one included."""
    return _Sharing.on_host


def host_share(whole: int) -> int:
    """One process' part of what those on all devices share."""
    return whole // _Sharing.on_host
