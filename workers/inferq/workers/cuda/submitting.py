"""One run on a stream: the copy in, the computing, the copy out, and events between them.

    h2d      pinned → device        an event before it, and one after it
    compute  the executor           an event after it
    d2h      device → pinned        an event after it
    done     the event that the lane waits for

As a CUDA graph all but the last is one launch, and its times hold nothing of the host. Submitted
one by one, the host's pauses are on the card's clock where it has nothing to do meanwhile: so the
GIL is kept from the first command to the last, but for what the executor does itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from inferq.shared.schema import GpuTimes
from inferq.workers.cuda import calls
from inferq.workers.cuda.buffers import Block
from inferq.workers.cuda.calls import DriverError, Event

_TIMES: Final = 4


@dataclass(frozen=True)
class Copies:
    """What a run copies: from the beginnings of both blocks so many bytes each."""

    inputs: Block
    outputs: Block
    bytes_in: int
    bytes_out: int


class Submission:
    """A lane's stream, by its handle, and its events. The context is current whenever it is used.

    `spin`: the thread asks the card in a loop until a run has ended; else it sleeps.
    """

    def __init__(self, stream: int, *, spin: bool) -> None:
        self._stream = stream
        self._events: list[Event] = []
        try:
            for _ in range(_TIMES):
                self._events.append(calls.timing_event())
            self._done = calls.waiting_event(spin=spin)
        except BaseException:
            self._close_events()
            raise

    def put(self, copies: Copies, compute: Callable[[], None], *, captured: bool = False) -> None:
        """Put a run on the stream. `captured`: the stream captures."""
        stream = self._stream
        before, begun, ended, after = self._events
        self._record(before, captured)
        calls.copy_to_device(copies.inputs.address, copies.inputs.host, copies.bytes_in, stream)
        self._record(begun, captured)
        compute()
        self._record(ended, captured)
        calls.copy_to_host(copies.outputs.host, copies.outputs.address, copies.bytes_out, stream)
        self._record(after, captured)

    def finish(self) -> GpuTimes:
        """Wait until all that was put on the stream is done. Of a run: where its time went.

        What is waited for is recorded behind a graph, never in it: until such a record is reached
        on the card, its event has the state of the last launch, whose outputs are another batch's.
        """
        self.wait()
        before, begun, ended, after = self._events
        return GpuTimes(
            h2d_ms=begun.ms_since(before),
            compute_ms=ended.ms_since(begun),
            d2h_ms=after.ms_since(ended),
        )

    def wait(self) -> None:
        """Until all that was put on the stream is done."""
        self._done.record(self._stream)
        self._done.wait()

    def repeated(self, compute: Callable[[], None], times: int) -> float:
        """How many ms `compute` takes if it is put on the stream `times` times in a row, each."""
        _, begun, ended, _ = self._events
        begun.record(self._stream)
        for _ in range(times):
            compute()
        ended.record(self._stream)
        self.wait()
        return ended.ms_since(begun) / times

    def close(self) -> None:
        """Free the events. DriverError."""
        try:
            self._done.close()
        finally:
            self._close_events()

    def _record(self, event: Event, captured: bool) -> None:
        if captured:
            event.record_in_graph(self._stream)
        else:
            event.record(self._stream)

    def _close_events(self) -> None:
        while self._events:
            with suppress(DriverError):
                self._events.pop().close()
