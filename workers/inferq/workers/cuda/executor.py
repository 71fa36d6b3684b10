"""What computes on a lane's device memory, as a lane sees it: TensorRT's contexts, a torch program.

set_shapes   the inputs' shapes; answers the outputs'
set_address  where each tensor of these shapes stands, once for each
enqueue      a run on a stream; any number of them, as long as the shapes stay
capture      a graph of all that a function puts on a stream, `enqueue` among it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

Shape = tuple[int, ...]


class Replay(Protocol):
    """A captured run."""

    def launch(self) -> None:
        """Put it on the stream that it was captured on. OutOfDeviceMemory, or any Exception."""
        ...

    def close(self) -> None:
        """Free it; nothing of it is running."""
        ...


class Executor(Protocol):
    """What computes on the device's memory; each belongs to one lane. Errors are any Exception.

    The device's context is current whenever it is called.
    """

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        """At how many rows a batch of inputs of these shapes runs: as many; or more, to which it is
        padded; or fewer, so that it has to be split. RequestError: at none.
        """
        ...

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """The next runs' inputs have these shapes; return the outputs'. RequestError: too large.

        No graph is being captured meanwhile, by any lane.
        """
        ...

    def set_address(self, name: str, address: int) -> None:
        """Where this input or output stands, as long as the shapes that were set last are in force.

        It is called after each `set_shapes` before a run. Addresses are multiples of 256.
        """
        ...

    def enqueue(self, stream: int) -> None:
        """Put one run on the stream of this handle, which may be capturing: see `capture`."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> Replay:
        """A graph of all that `work` puts on the stream of this handle. CaptureFailed: the reason.

        `work` calls `enqueue(stream)` once, and puts copies and records of events on the stream
        by the driver's own functions. A run of these shapes was enqueued before. No other lane
        captures, or does for the first time what cannot be done meanwhile. Shapes are set again
        before anything is enqueued after it.
        """
        ...

    def close(self) -> None:
        """Free it; nothing of it is running."""
        ...
