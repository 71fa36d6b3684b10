"""Saves CPU: keeps freed memory, and keeps garbage collections off a worker's first objects.

glibc returns blocks over 128 KiB to the kernel when they are freed. Every request of that size then
takes fresh, zeroed pages. With 150 KB requests that was more than half of a worker's CPU.

A full garbage collection visits every object, of which Celery alone makes hundreds of thousands,
and stops all threads: for about 90 ms in each second while many links are published.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: The largest value that glibc accepts.
MMAP_THRESHOLD: Final = 32 * 1024 * 1024
#: Bytes that may lie free at the end of the heap.
TRIM_THRESHOLD: Final = 256 * 1024 * 1024


#: The same for a child process, for good: glibc reads these when it starts.
FOR_CHILDREN: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; False with another C library, where nothing need be done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    )


def keep_objects() -> None:
    """Make garbage collections skip all objects that exist now."""
    gc.collect()
    gc.freeze()
