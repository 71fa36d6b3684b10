"""A lane on a GPU: one stream, one executor, and buffers of fixed addresses.

    gather   requests' rows → pinned memory                     this thread
    run      copy in, compute, copy out (see submitting)        the stream, from here on
    wait     for its end, GIL released                          this thread

A set of shapes runs twice as single commands, then it is captured: a CUDA graph of all of them, one
launch a batch. While one lane's stream copies, another's computes: two lanes hide the copies. Each
lane's thread does both, submits and waits, so nothing is handed over between threads.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

from pycuda import driver

from inferq.shared.errors import FatalEngineError, RequestError
from inferq.shared.schema import Array, GpuTimes
from inferq.workers.cuda import calls
from inferq.workers.cuda.buffers import Block, placed
from inferq.workers.cuda.captures import CAPTURES, no_garbage_collection
from inferq.workers.cuda.device import Device
from inferq.workers.cuda.executor import Executor, Replay, Shape
from inferq.workers.cuda.graphs import CaptureFailed, Graphs
from inferq.workers.cuda.splitting import RowLimit, Splitter
from inferq.workers.cuda.submitting import Copies, Submission
from inferq.workers.models.engine import Batch, gather_into, without_padding
from inferq.workers.models.joining import copied

logger = logging.getLogger(__name__)

#: Sets of shapes whose views and graphs are kept. Buckets are few; dims that are not padded may
#: take any size.
KEPT_SHAPES: Final = 64
#: Runs of a set of shapes until it is captured: the first ones prepare what cannot be captured, and
#: what runs once only is not worth it.
RUNS_BEFORE_CAPTURE: Final = 2
#: Seconds that a capture waits for others to submit what they are at. It can be made later, too.
CAPTURE_WAIT_S: Final = 0.2
#: The same of what captures by itself, within a run that cannot be put off: then it runs beside
#: them, and may fail. They may be compiling the kernels of a size.
RUN_WAIT_S: Final = 60.0
_NON_BLOCKING: Final = 1


def block_bytes(
    executor: Executor,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    largest: Sequence[Mapping[str, Shape]],
) -> tuple[int, int]:
    """The most bytes that all inputs, and all outputs, take with any of the sets of inputs' shapes
    in `largest`. `inputs`, `outputs`: name → dtype.
    """
    most_in = most_out = 0
    for shapes in largest:
        with CAPTURES.shared():
            answered = executor.set_shapes(shapes)
        most_in = max(most_in, placed(inputs, shapes)[1])
        most_out = max(most_out, placed(outputs, answered)[1])
    return most_in, most_out


class _Bound:
    """One set of shapes: where its tensors stand, and its graph."""

    def __init__(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        self.shapes = shapes
        self.addresses = addresses
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}
        self.copies: Copies
        self.graph: Replay | None = None
        self.runs = 0


class CudaLane:
    """Made, run and closed by any thread, one at a time.

    `inputs`, `outputs`: name → dtype. `largest`: sets of the inputs' largest shapes, for any of
    which memory is taken here. PyCUDA's MemoryError: there is not enough; nothing is kept then, and
    `executor` is closed. `buckets`: the usual batch sizes, ascending. `limit`, `graphs`: shared by
    the lanes of a model. `spin`: see `Submission`.
    """

    def __init__(
        self,
        device: Device,
        executor: Executor,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        largest: Sequence[Mapping[str, Shape]],
        limit: RowLimit,
        *,
        buckets: Sequence[int],
        graphs: Graphs,
        spin: bool = False,
    ) -> None:
        self._device = device
        self._executor = executor
        self._graphs = graphs
        self._splitter = Splitter(
            list(inputs), list(outputs), limit, buckets=buckets, takes=self._takes, run=self._run
        )
        self._bound: OrderedDict[tuple[Shape, ...], _Bound] = OrderedDict()
        #: Whose shapes and addresses the executor has.
        self._set: _Bound | None = None
        #: What ran last.
        self._last: _Bound | None = None
        self.gpu_times: GpuTimes | None = None
        self._dtypes = dict(inputs), dict(outputs)
        self._blocks: list[Block] = []
        self.is_closed = False
        self._submission: Submission | None = None
        with device:
            try:
                self._stream = driver.Stream(_NON_BLOCKING)
            except BaseException:
                executor.close()
                raise
            try:
                self._submission = Submission(self._stream.handle, spin=spin)
                for size in block_bytes(executor, inputs, outputs, largest):
                    self._blocks.append(Block(size))
            except BaseException:
                self._free()
                raise

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """As in `Lane`. Where memory is short the batch is split, and those after it."""
        return self._splitter.run(batch) if batch.batchable else self._run(batch)

    def repeat(self, batch: Batch, times: int) -> float:
        """How many ms `batch` takes if it is computed `times` times in a row without copies, each.

        By the card's clock. It is what lanes can come close to, all of them together.
        """
        for _ in range(RUNS_BEFORE_CAPTURE + 1):
            self.run(batch)
        bound, submission = self._last, self._submission
        assert bound is not None
        assert submission is not None
        stream = self._stream.handle
        with self._device.entered():
            self._tell_executor(bound)
            if self._graph(bound) is None:
                return submission.repeated(lambda: self._executor.enqueue(stream), times)
            with CAPTURES.exclusive(RUN_WAIT_S, ahead=True):
                alone = self._executor.capture(stream, lambda: self._executor.enqueue(stream))
            self._set = None
            try:
                return submission.repeated(alone.launch, times)
            finally:
                alone.close()

    def _takes(self, shapes: Mapping[str, Shape]) -> int:
        key = tuple(shapes.values())
        return key[0][0] if key in self._bound else self._executor.rows(shapes)

    def _run(self, batch: Batch) -> Mapping[str, Array]:
        submission = self._submission
        assert submission is not None
        try:
            with self._device.entered():
                bound = self._bind(batch)
                # Once for this run: another lane may turn graphs off meanwhile.
                graph = self._graph(bound)
                if graph is None:  # a graph has its shapes in it
                    self._tell_executor(bound)
                gather_into(batch, bound.inputs)
                if graph is None:
                    self._enqueue(bound, submission)
                else:
                    graph.launch()
                self.gpu_times = submission.finish()
                self._last = bound
                if bound.graph is None:
                    bound.runs += 1
                    if bound.runs >= RUNS_BEFORE_CAPTURE and self._graphs.on:
                        self._capture(bound, submission)
        except (RequestError, FatalEngineError):
            raise  # its shapes were refused, before anything was asked of CUDA; or there is no CUDA
        except Exception as problem:
            raise self._device.judge(problem) from problem
        outputs = without_padding(batch, bound.outputs)
        return {name: copied(array) for name, array in outputs.items()}

    def _bind(self, batch: Batch) -> _Bound:
        if batch.batchable:
            shapes = self._splitter.shapes(batch, batch.bucket)
        else:
            shapes = {name: batch.parts[0][name].shape for name in self._dtypes[0]}
        key = tuple(shapes.values())
        bound = self._bound.get(key)
        if bound is None:
            return self._new(key, shapes)
        self._bound.move_to_end(key)
        return bound

    def _tell_executor(self, bound: _Bound) -> None:
        """Of the shapes and addresses of the next runs."""
        if bound is not self._set:
            self._set = None  # if this fails, what the executor has is not known
            with CAPTURES.shared():
                self._executor.set_shapes(bound.shapes)
            self._set_addresses(bound)

    def _set_addresses(self, bound: _Bound) -> None:
        for name, address in bound.addresses.items():
            self._executor.set_address(name, address)
        self._set = bound

    def _new(self, key: tuple[Shape, ...], shapes: Mapping[str, Shape]) -> _Bound:
        self._set = None
        with CAPTURES.shared():
            answered = self._executor.set_shapes(shapes)
        (dtypes_in, dtypes_out), (block_in, block_out) = self._dtypes, self._blocks
        offsets_in, bytes_in = placed(dtypes_in, shapes)
        offsets_out, bytes_out = placed(dtypes_out, answered)
        block_in.check("inputs", bytes_in)
        block_out.check("outputs", bytes_out)
        addresses = {name: block_in.address + at for name, at in offsets_in.items()}
        addresses |= {name: block_out.address + at for name, at in offsets_out.items()}
        bound = _Bound(shapes, addresses)
        for name, at in offsets_in.items():
            bound.inputs[name] = block_in.view(at, dtypes_in[name], shapes[name])
        for name, at in offsets_out.items():
            bound.outputs[name] = block_out.view(at, dtypes_out[name], answered[name])
        bound.copies = Copies(block_in, block_out, bytes_in, bytes_out)
        self._set_addresses(bound)
        self._bound[key] = bound
        if len(self._bound) > KEPT_SHAPES:
            _, oldest = self._bound.popitem(last=False)
            if oldest.graph is not None:
                oldest.graph.close()
        return bound

    def _graph(self, bound: _Bound) -> Replay | None:
        """None: it runs as single commands."""
        return bound.graph if self._graphs.on else None

    def _enqueue(self, bound: _Bound, submission: Submission) -> None:
        with self._not_spoilt(bound):
            submission.put(bound.copies, lambda: self._executor.enqueue(self._stream.handle))

    def _not_spoilt(self, bound: _Bound) -> AbstractContextManager[object]:
        """While it runs as single commands, no capture is: neither another's by it, nor its own.

        A first run loads kernels, and chooses among them; any may be the first of something. What
        captures by itself may do so as often as the shapes change.
        """
        fresh = bound is not self._last or bound.runs <= RUNS_BEFORE_CAPTURE
        if self._graphs.within_runs and fresh:
            return CAPTURES.exclusive(RUN_WAIT_S, ahead=True)
        return CAPTURES.shared()

    def _capture(self, bound: _Bound, submission: Submission) -> None:
        stream, executor = self._stream.handle, self._executor

        def work() -> None:
            submission.put(bound.copies, lambda: executor.enqueue(stream), captured=True)

        with CAPTURES.exclusive(CAPTURE_WAIT_S) as mine:
            if not mine:
                return
            try:
                with no_garbage_collection():
                    bound.graph = executor.capture(stream, work)
                self._set = None
            except CaptureFailed as problem:
                self._graphs.turn_off(problem)
                self._clear_error()

    def _clear_error(self) -> None:
        """The next call may be answered by what broke the capture: so one is made for that."""
        try:
            self._executor.enqueue(self._stream.handle)
            calls.synchronize_stream(self._stream.handle)
        except Exception as problem:  # noqa: BLE001 - if it stays, the next batch is told
            logger.info("a run after a capture that failed: %s", problem)

    def close(self) -> None:
        """Free all of it. Nothing is running. Whatever CUDA answers, it is not raised. Idempotent.

        Once CUDA is beyond use nothing is freed: the process is about to end, and what frees would
        meet the error again, in destructors that end the process at a place of their own.
        """
        if self.is_closed:
            return
        self.is_closed = True
        try:
            with self._device:
                self._free()
        except FatalEngineError as fatal:
            self._device.keep_for_good(self)
            logger.warning("a lane is not freed: %s", fatal)

    def _free(self) -> None:
        # By itself: what its variables hold goes while the context is current, too.
        self._try(lambda: calls.synchronize_stream(self._stream.handle))
        for bound in self._bound.values():
            if bound.graph is not None:
                self._try(bound.graph.close)
        if self._submission is not None:
            self._try(self._submission.close)
        self._try(self._close_executor)
        self._bound.clear()
        self._set = self._last = self._submission = None
        self._blocks.clear()
        del self._stream

    def _close_executor(self) -> None:
        with CAPTURES.shared():
            self._executor.close()

    def _try(self, free: Callable[[], None]) -> None:
        """What is not freed keeps nothing else. FatalEngineError: nothing more is to be freed."""
        try:
            free()
        except Exception as problem:
            judged = self._device.judge(problem)
            if isinstance(judged, FatalEngineError):
                raise judged from problem
            logger.warning("a lane was not closed cleanly: %s", problem)
