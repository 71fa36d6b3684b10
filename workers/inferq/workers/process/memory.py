"""Keeps what a worker uses all its life in place: freed memory, and the objects that it began with.

glibc gives blocks over 128 KiB back to the kernel when they are freed; every request of that size
then pays for fresh, zeroed pages. With 150 KB requests that was more than half of a worker's CPU.

A full garbage collection looks at every object, of which Celery alone makes hundreds of thousands,
and nothing else runs meanwhile: 90 ms a second or so once many links are published.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: The most that glibc takes.
MMAP_THRESHOLD: Final = 32 * 1024 * 1024
#: Bytes that may lie free at the end of the heap.
TRIM_THRESHOLD: Final = 256 * 1024 * 1024


#: The same for a child process, for good: glibc reads these when it starts.
FOR_CHILDREN: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


def keep_freed_memory() -> bool:
    """Tell glibc; False where there is another C library, which is as well."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    )


def keep_objects() -> None:
    """Have garbage collections pass over all objects that there are now."""
    gc.collect()
    gc.freeze()
