"""What this process may take of a device's memory that several worker processes share.

Each has one part of so many, and no more even where the others have not taken theirs yet: they all
load at once. CUDA's own memory in each process (some hundred MB) is in nobody's part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from inferq.workers.cuda.libcuda import total_memory
from inferq.workers.process import shares

_lock: Final = threading.Lock()
_held: Final[list[Held]] = []


class Held:
    """What one model's lanes have of the device, as far as its engine tells. For any thread."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Callable[[], bool]]] = []
        with _lock:
            _held.append(self)

    @property
    def bytes(self) -> int:
        """All that was added and is not given back."""
        return sum(nbytes for nbytes, is_freed in self._parts if not is_freed())

    def add(self, nbytes: int, is_freed: Callable[[], bool] = lambda: False) -> None:
        """So many more, until `is_freed`."""
        self._parts.append((nbytes, is_freed))

    def close(self) -> None:
        """It has nothing any more."""
        with _lock:
            _held.remove(self)


def left(total: int) -> int:
    """Bytes that this process may take beyond what it has, of a device of `total` bytes.

    All of them where it has the device for itself: then what is free tells.
    """
    if shares.processes() == 1:
        return total
    with _lock:
        return max(0, shares.share(total) - sum(each.bytes for each in _held))


def limit() -> int | None:
    """Bytes that an engine with an allocator of its own may take; None: as many as there are."""
    if shares.processes() == 1:
        return None
    total = total_memory()
    return None if total is None else max(1, left(total))


def whose() -> str:
    """What a message about memory that is left adds, where others have their parts of it."""
    if shares.processes() == 1:
        return ""
    return f" to each of {shares.processes()} processes"
