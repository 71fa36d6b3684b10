"""Keeps freed memory in the process, since the next batch needs just as much of it.

glibc gives blocks over 128 KiB back to the kernel when they are freed; every request of that size
then pays for fresh, zeroed pages. With 150 KB requests that was more than half of a worker's CPU.
"""

from __future__ import annotations

import ctypes
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
