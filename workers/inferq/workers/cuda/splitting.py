"""Batches that do not run as they are: more rows than a run takes, or than the GPU's memory holds.

rows    at how many rows a batch of these would run        the executor, the limit
run     at so many, or in pieces, each of at most so many   halved while memory is short
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from inferq.shared.schema import Array, Tensors
from inferq.workers.cuda.executor import Shape
from inferq.workers.models.engine import Batch, OutOfDeviceMemory

logger = logging.getLogger(__name__)


class RowLimit:
    """How many rows fit the GPU's memory, as far as it was found out. Shared by a model's lanes.

    It is counted in elements of the inputs: of small rows more fit than of large ones. Padding
    counts: what a run takes depends on its bucket.
    """

    def __init__(self) -> None:
        self._elements = math.inf

    def rows(self, of: Tensors) -> float:
        """So many rows as those of the inputs `of`, at least one."""
        if self._elements == math.inf:
            return math.inf
        return max(1.0, self._elements / _row_elements(of))

    def lower(self, of: Tensors, rows: int) -> None:
        """No more than `rows` such rows fit."""
        self._elements = min(self._elements, rows * _row_elements(of))


def _row_elements(of: Tensors) -> int:
    return max(1, sum(math.prod(array.shape[1:]) for array in of.values()))


class Splitter:
    """Runs a lane's batches, split where they have to be.

    `inputs`, `outputs`: names. `takes`: at how many rows inputs of these shapes run, as
    `Executor.rows`. `run`: one batch, at its bucket. `buckets`: the usual batch sizes, ascending.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        limit: RowLimit,
        *,
        buckets: Sequence[int],
        takes: Callable[[Mapping[str, Shape]], int],
        run: Callable[[Batch], Mapping[str, Array]],
    ) -> None:
        self._inputs = inputs
        self._outputs = outputs
        self._limit = limit
        self._buckets = buckets
        self._takes = takes
        self._run_one = run

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """As in `Lane`. Where memory is short the batch is split, and those after it."""
        rows = self._rows(batch, batch.bucket)
        if rows < batch.rows:
            return self._in_pieces(batch, rows)
        return self._fitting(batch, rows)

    def shapes(self, batch: Batch, rows: int) -> dict[str, Shape]:
        """Of the inputs, at so many rows."""
        first = batch.parts[0]
        return {name: (rows, *first[name].shape[1:]) for name in self._inputs}

    def _fitting(self, batch: Batch, rows: int) -> Mapping[str, Array]:
        """At `rows` rows, or in smaller pieces for as long as memory is too short for them."""
        fit = self._limit.rows(batch.parts[0])
        if fit < rows and (fitting := self._rows(batch, int(fit))) < rows:
            return self._in_pieces(batch, fitting)
        try:
            return self._run_one(replace(batch, bucket=rows) if rows != batch.bucket else batch)
        except OutOfDeviceMemory:
            most = self._rows(batch, (rows + 1) // 2)
            if most >= rows:
                raise
            self._limit.lower(batch.parts[0], most)
            fitting = int(self._limit.rows(batch.parts[0]))
            logger.warning(
                "out of GPU memory at %d rows: runs are of at most %d now", rows, fitting
            )
            return self._in_pieces(batch, self._rows(batch, fitting))

    def _rows(self, batch: Batch, rows: int) -> int:
        return self._takes(self.shapes(batch, rows))

    def _in_pieces(self, batch: Batch, most: int) -> Mapping[str, Array]:
        """Of at most `most` rows, padded where no run has as few as the last one."""
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
            pieces.append(self._fitting(Batch([part], count, ran), ran))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self._outputs}
