"""Memory that a worker and one of its lanes' processes share.

It is a file without a name (memfd) whose descriptor the process inherits: it is gone with the last
of the two, however that ends. It grows as it is asked to, up to a limit, and cannot shrink, or
whoever reads it beyond its new end would be killed (SIGBUS).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress
from typing import Final

import numpy as np

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array

#: What one batch leaves in it stays there for the next ones, up to so many bytes.
KEPT_BYTES: Final = 64 << 20
_LEAST_BYTES: Final = 64 << 10
#: fcntl.h
_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 2


def new_file(name: str) -> int:
    """A descriptor of new, empty shared memory. Close it."""
    file = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(file, _F_ADD_SEALS, _F_SEAL_SHRINK)
    return file


class Shared:
    """One side's view of it."""

    def __init__(self, file: int, most: int) -> None:
        self._file = file
        #: Bytes.
        self._most = most
        self._map: mmap.mmap | None = None
        self._bytes = np.empty(0, np.uint8)

    def write(self, size: int) -> Array:
        """At least `size` bytes to write to. EngineError: more than the most."""
        if size > self._most:
            raise EngineError(
                f"the tensors of a batch are {size} bytes; expected at most {self._most}, which is "
                "max_request_bytes × max_batch_size"
            )
        if size > len(self._bytes):
            grown = max(_LEAST_BYTES, 1 << (size - 1).bit_length())
            if os.fstat(self._file).st_size < grown:
                os.ftruncate(self._file, grown)
            self._attach(grown)
        return self._bytes

    def read(self, size: int) -> Array:
        """At least the `size` bytes that the other side has written. EngineError: has not."""
        if size > len(self._bytes):
            there = os.fstat(self._file).st_size
            if not size <= there:
                raise EngineError(f"a lane's process tells of {size} bytes of {there}")
            self._attach(there)
        return self._bytes

    def _attach(self, size: int) -> None:
        # Arrays that are still there keep what was mapped before.
        self._map = mmap.mmap(self._file, size)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def give_back(self, used: int) -> None:
        """A batch of `used` bytes is over: what is above `KEPT_BYTES` goes back to the kernel."""
        if used > KEPT_BYTES and self._map is not None:
            with suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE, KEPT_BYTES, len(self._map) - KEPT_BYTES)

    def close(self) -> None:
        """Idempotent."""
        self._map, self._bytes = None, np.empty(0, np.uint8)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
