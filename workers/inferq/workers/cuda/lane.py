"""A lane on a GPU: one stream, one executor, and buffers of fixed addresses.

    gather   requests' rows → pinned memory         this thread
    h2d      pinned → device        event           the stream, from here on
    compute  the executor, as a CUDA graph if it can be one        event
    d2h      device → pinned        event
    wait     for the last event, GIL released        this thread

While one lane's stream copies, another's computes: two lanes hide the copies. Each lane's thread
does both, submits and waits, so nothing is handed over between threads.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from pycuda import driver

from inferq.shared.errors import RequestError
from inferq.shared.schema import Array, GpuTimes, Tensors
from inferq.workers.cuda.buffers import Buffer, nbytes
from inferq.workers.cuda.device import Device
from inferq.workers.cuda.executor import Executor, Replay, Shape
from inferq.workers.cuda.graphs import CaptureFailed
from inferq.workers.models.engine import Batch, OutOfDeviceMemory, without_padding

logger = logging.getLogger(__name__)

#: Sets of shapes whose views and graphs are kept. Buckets are few; dims that are not padded may
#: take any size.
KEPT_SHAPES: Final = 64
_NON_BLOCKING: Final = 1


class RowLimit:
    """How many rows fit the GPU's memory, as far as it was found out. Shared by a model's lanes.

    It is counted in elements of the inputs: of small rows more fit than of large ones. Padding
    counts: what a run takes depends on its bucket.
    """

    def __init__(self) -> None:
        self._elements = math.inf

    def rows(self, of: Tensors) -> float:
        """So many rows as those of the inputs `of`, at least one."""
        return max(1.0, self._elements / _row_elements(of))

    def lower(self, of: Tensors, rows: int) -> None:
        """No more than `rows` such rows fit."""
        self._elements = min(self._elements, rows * _row_elements(of))


def _row_elements(of: Tensors) -> int:
    return max(1, sum(math.prod(array.shape[1:]) for array in of.values()))


def tensor_bytes(
    executor: Executor, dtypes: Mapping[str, str], largest: Sequence[Mapping[str, Shape]]
) -> dict[str, int]:
    """Name of each tensor of `dtypes` → the most bytes that it has with any of the sets of inputs'
    shapes in `largest`.
    """
    sets = [{**shapes, **executor.set_shapes(shapes)} for shapes in largest]
    return {
        name: max(nbytes(dtype, shapes[name]) for shapes in sets) for name, dtype in dtypes.items()
    }


class _Bound:
    """One set of shapes: where its tensors stand in the pinned memory, and its graph."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}
        self.graph: Replay | None = None
        self.has_run = False


class CudaLane:
    """Made, run and closed by any thread, one at a time.

    `inputs`, `outputs`: name → dtype. `largest`: sets of the inputs' largest shapes, for any of
    which memory is taken here. PyCUDA's MemoryError: there is not enough; nothing is kept then, and
    `executor` is closed. `buckets`: the usual batch sizes, ascending. `graphs`: whether runs are
    captured.
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
        graphs: bool,
    ) -> None:
        self._device = device
        self._executor = executor
        self._limit = limit
        self._buckets = buckets
        self._graphs = graphs
        self._bound: OrderedDict[tuple[Shape, ...], _Bound] = OrderedDict()
        self._current: _Bound | None = None
        self.gpu_times: GpuTimes | None = None
        self._inputs, self._outputs = list(inputs), list(outputs)
        self._buffers: dict[str, Buffer] = {}
        self._events: list[driver.Event] = []
        with device:
            try:
                self._stream = driver.Stream(_NON_BLOCKING)
            except BaseException:
                executor.close()
                raise
            try:
                self._take({**inputs, **outputs}, largest)
            except BaseException:
                self._free()
                raise

    def _take(self, dtypes: Mapping[str, str], largest: Sequence[Mapping[str, Shape]]) -> None:
        flags = driver.event_flags.BLOCKING_SYNC  # a lane that waits leaves its core to others
        self._events += [driver.Event(flags) for _ in range(4)]
        for name, size in tensor_bytes(self._executor, dtypes, largest).items():
            self._buffers[name] = Buffer(dtypes[name], size)
            self._executor.set_address(name, self._buffers[name].address)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """As in `Lane`. Where memory is short the batch is split, and those after it."""
        if not batch.batchable:
            return self._run(batch)
        rows = self._rows(batch, batch.bucket)
        if rows < batch.rows:
            return self._run_split(batch, rows)
        return self._run_fitting(batch, rows)

    def _run_fitting(self, batch: Batch, rows: int) -> Mapping[str, Array]:
        """At `rows` rows, or in smaller pieces for as long as memory is too short for them."""
        fitting = self._rows(batch, int(min(rows, self._limit.rows(batch.parts[0]))))
        if fitting < rows:
            return self._run_split(batch, fitting)
        try:
            return self._run(replace(batch, bucket=rows) if rows != batch.bucket else batch)
        except OutOfDeviceMemory:
            most = self._rows(batch, (rows + 1) // 2)
            if most >= rows:
                raise
            self._limit.lower(batch.parts[0], most)
            fitting = int(self._limit.rows(batch.parts[0]))
            logger.warning(
                "out of GPU memory at %d rows: runs are of at most %d now", rows, fitting
            )
            return self._run_split(batch, self._rows(batch, fitting))

    def repeat(self, batch: Batch, times: int) -> float:
        """How many ms `batch` takes if it is computed `times` times in a row without copies, each.

        By the card's clock. It is what lanes can come close to, all of them together.
        """
        self.run(batch)
        bound = self._current
        assert bound is not None
        with self._device:
            _, began, ended, _ = self._events
            began.record(self._stream)
            for _ in range(times):
                self._compute(bound)
            ended.record(self._stream)
            ended.synchronize()
            taken: float = ended.time_since(began)
        return taken / times

    def _rows(self, batch: Batch, rows: int) -> int:
        """At how many rows `rows` of `batch` run: see `Executor.rows`."""
        shapes = self._shapes(batch, rows)
        return rows if tuple(shapes.values()) in self._bound else self._executor.rows(shapes)

    def _shapes(self, batch: Batch, rows: int) -> dict[str, Shape]:
        first = batch.parts[0]
        if not batch.batchable:
            return {name: first[name].shape for name in self._inputs}
        return {name: (rows, *first[name].shape[1:]) for name in self._inputs}

    def _run_split(self, batch: Batch, most: int) -> Mapping[str, Array]:
        """In pieces of at most `most` rows, padded where no run has as few as the last one."""
        usual = max((size for size in self._buckets if size <= most), default=most)
        if self._rows(batch, usual) == usual:
            most = usual
        names = list(batch.parts[0])
        rows = {name: np.concatenate([part[name] for part in batch.parts]) for name in names}
        pieces = []
        for begin in range(0, batch.rows, most):
            part: Tensors = {name: array[begin : begin + most] for name, array in rows.items()}
            count = min(most, batch.rows - begin)
            bucket = next((size for size in self._buckets if count <= size <= most), count)
            ran = self._rows(batch, bucket)
            pieces.append(self._run_fitting(Batch([part], count, ran), ran))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self._outputs}

    def _run(self, batch: Batch) -> Mapping[str, Array]:
        shapes = self._shapes(batch, batch.bucket)
        with self._device:
            try:
                bound = self._bind(shapes)
                _gather(batch, bound.inputs)
                self._submit(bound)
                self._events[-1].synchronize()
                if bound.graph is None and self._graphs and bound.has_run:
                    self._capture(bound)
                bound.has_run = True
                h2d, began, ended, done = self._events
                self.gpu_times = GpuTimes(
                    h2d_ms=began.time_since(h2d),
                    compute_ms=ended.time_since(began),
                    d2h_ms=done.time_since(ended),
                )
            except RequestError:
                raise  # its shapes were refused, before anything was asked of CUDA
            except Exception as problem:
                raise self._device.judge(problem) from problem
        outputs = without_padding(batch, bound.outputs)
        return {name: array.copy() for name, array in outputs.items()}

    def _bind(self, shapes: Mapping[str, Shape]) -> _Bound:
        key = tuple(shapes.values())
        bound = self._bound.get(key)
        if bound is None:
            bound = self._new(key, shapes)
        elif bound is not self._current:
            self._bound.move_to_end(key)
            if bound.graph is None:  # a graph has its shapes in it
                self._current = None  # if this fails, the executor's shapes are not known
                self._executor.set_shapes(bound.shapes)
        self._current = bound
        return bound

    def _new(self, key: tuple[Shape, ...], shapes: Mapping[str, Shape]) -> _Bound:
        self._current = None
        bound = _Bound(shapes)
        outputs = self._executor.set_shapes(shapes)
        for name in self._inputs:
            bound.inputs[name] = self._buffers[name].view(shapes[name])
        for name in self._outputs:
            bound.outputs[name] = self._buffers[name].view(outputs[name])
        self._bound[key] = bound
        if len(self._bound) > KEPT_SHAPES:
            _, oldest = self._bound.popitem(last=False)
            if oldest.graph is not None:
                oldest.graph.close()
        return bound

    def _submit(self, bound: _Bound) -> None:
        h2d, began, ended, done = self._events
        h2d.record(self._stream)
        for name, array in bound.inputs.items():
            driver.memcpy_htod_async(self._buffers[name].address, array, self._stream)
        began.record(self._stream)
        self._compute(bound)
        ended.record(self._stream)
        for name, array in bound.outputs.items():
            driver.memcpy_dtoh_async(array, self._buffers[name].address, self._stream)
        done.record(self._stream)

    def _compute(self, bound: _Bound) -> None:
        if bound.graph is not None:
            bound.graph.launch()
        else:
            self._executor.enqueue(self._stream.handle)

    def _capture(self, bound: _Bound) -> None:
        """What a first run prepares cannot be captured; what runs once only is not worth it."""
        try:
            bound.graph = self._executor.capture(
                self._stream.handle, lambda: self._executor.enqueue(self._stream.handle)
            )
        except CaptureFailed as problem:
            self._graphs = False
            logger.info("runs without CUDA graphs: %s", problem)

    def close(self) -> None:
        """Free all of it. Nothing is running. Whatever CUDA answers, it is not raised."""
        with self._device:
            self._free()

    def _free(self) -> None:
        # By itself: what its variables hold goes while the context is current, too.
        try:
            self._stream.synchronize()
            for bound in self._bound.values():
                if bound.graph is not None:
                    bound.graph.close()
            self._executor.close()
        except Exception as problem:  # noqa: BLE001 - the process is about to end then
            logger.warning("a lane was not closed cleanly: %s", problem)
        self._bound.clear()
        self._current = None
        self._buffers.clear()
        del self._events, self._stream


def _gather(batch: Batch, into: Mapping[str, Array]) -> None:
    """Each request's rows to their place in the batch; padding repeats the last row."""
    began = time.perf_counter()
    if batch.batchable:
        _join(batch, into)
    else:
        for name, array in batch.parts[0].items():
            into[name][...] = array
    batch.gather_ms = (time.perf_counter() - began) * 1000


def _join(batch: Batch, into: Mapping[str, Array]) -> None:
    for name, rows in into.items():
        at = 0
        for part in batch.parts:
            array = part[name]
            rows[at : at + len(array)] = array
            at += len(array)
        if at < batch.bucket:
            rows[at:] = rows[at - 1]
