"""Memory of a fixed size and address, on both sides of the bus."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pycuda import driver

from inferq.shared.schema import Array


class Buffer:
    """Pinned host memory and as much device memory, for one tensor of at most `size` bytes.

    Made, and freed, while the device's context is current. MemoryError of PyCUDA's: one of both is
    full.
    """

    def __init__(self, dtype: str, size: int) -> None:
        self._dtype = np.dtype(dtype)
        self._host: Array = driver.pagelocked_empty(size, np.uint8)
        try:
            self._device = driver.mem_alloc(size)
        except BaseException:
            del self._host  # now, while the context is current: the error keeps this object
            raise
        #: On the device.
        self.address = int(self._device)

    def view(self, shape: Sequence[int]) -> Array:
        """The beginning of the pinned memory, as a tensor of `shape`."""
        size = math.prod(shape) * self._dtype.itemsize
        return self._host[:size].view(self._dtype).reshape(shape)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; at least 1, since no allocation may be empty."""
    return max(1, math.prod(shape) * np.dtype(dtype).itemsize)
