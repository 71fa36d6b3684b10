"""Memory of fixed addresses on both sides of the bus, and where a lane's tensors stand in it.

All inputs of a run stand one after the other, and so do its outputs: one copy carries them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from pycuda import driver

from inferq.shared.errors import EngineError
from inferq.shared.schema import Array
from inferq.workers.cuda.executor import Shape

#: Addresses are multiples of it: TensorRT asks for that, and kernels read wide words.
ALIGNMENT: Final = 256


class Block:
    """Pinned host memory, and as much device memory.

    Made, and freed, while the device's context is current. MemoryError of PyCUDA's: one of both is
    full.
    """

    def __init__(self, size: int) -> None:
        self._host: Array = driver.pagelocked_empty(size, np.uint8)
        try:
            self._device = driver.mem_alloc(size)
        except BaseException:
            del self._host  # now, while the context is current: the error keeps this object
            raise
        self.size = size
        #: On the device, and of the pinned memory.
        self.address = int(self._device)
        self.host = int(self._host.ctypes.data)

    def check(self, what: str, size: int) -> None:
        """EngineError: `what`, of `size` bytes, have no room in it."""
        if size > self.size:
            raise EngineError(f"{what} of {size} bytes; expected at most {self.size}")

    def view(self, offset: int, dtype: str, shape: Shape) -> Array:
        """The pinned memory from there on, as a tensor."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        return self._host[offset : offset + size].view(kind).reshape(shape)


def placed(dtypes: Mapping[str, str], shapes: Mapping[str, Shape]) -> tuple[dict[str, int], int]:
    """Where each tensor of `dtypes` begins, and the bytes from the first to the end of the last,
    which are 1 at least: no allocation may be empty, and no copy.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, dtype in dtypes.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + max(1, math.prod(shapes[name]) * np.dtype(dtype).itemsize)
    return offsets, max(1, end)
