"""Keeps batches from being larger than what fits, and notes one larger than any before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from inferq.shared.schema import Tensors
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import OutOfDeviceMemory
from inferq.workers.warmup.notes import Notes, Size

logger = logging.getLogger(__name__)

#: What libraries' errors say when there is not enough memory.
_SAID = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
)


def lacks_memory(problem: BaseException | None) -> bool:
    """Whether `problem`, or one of its causes, is a lack of memory."""
    while problem is not None:
        if isinstance(problem, MemoryError | OutOfDeviceMemory):
            return True
        text = str(problem).lower()
        if any(said in text for said in _SAID):
            return True
        problem = problem.__cause__
    return False


def row_elements(inputs: Tensors) -> int:
    """Elements of one row of all inputs."""
    return max(1, sum(math.prod(array.shape[1:]) for array in inputs.values()))


class Fit:
    """How large batches of one model may be, in elements of the inputs. Its lanes share it.

    `row`: elements of each row; None: rows differ.
    """

    def __init__(
        self,
        name: str,
        notes: Notes | None = None,
        elements: float = math.inf,
        row: int | None = None,
    ) -> None:
        self._name = name
        self._notes = notes
        self._row = row
        #: Most elements of one batch.
        self.elements = elements
        #: Batches of at most so many rows need no check: such batches ran before.
        self.free: float = 1
        self._look()

    def _look(self) -> None:
        survived = math.inf if self._notes is None else self._notes.survived
        most = min(self.elements, survived)
        if most == math.inf:
            self.free = most
        elif self._row is not None:
            self.free = max(1, most // self._row)
        else:
            self.free = 1

    def rows(self, inputs: Tensors) -> float:
        """The most rows like those of `inputs` that fit; at least one."""
        if self.elements == math.inf:
            return math.inf
        return max(1, self.elements // row_elements(inputs))

    def lower(self, inputs: Tensors, rows: int) -> None:
        """Memory did not suffice for `rows` such rows: from now on at most half of them fit."""
        most = max(1, rows // 2)
        fits = most * row_elements(inputs)
        if fits < self.elements:
            self.elements = fits
            self._look()
            logger.warning(
                "model %s: there is no memory for a batch of %d rows; batches of such rows are of "
                "at most %d now (max_batch_size = %d in model.toml keeps it so)",
                self._name,
                rows,
                most,
                most,
                extra=about(model=self._name),
            )

    @contextmanager
    def running(self, inputs: Tensors, rows: int) -> Iterator[None]:
        """A context in which `rows` such rows run."""
        elements = rows * row_elements(inputs)
        if self._notes is None or elements <= self._notes.survived:
            yield
            return
        with self._notes.trying(Size(elements, rows)):
            yield
        self._look()
