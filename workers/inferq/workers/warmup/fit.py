"""No batch runs that is larger than what fits; one larger than any before it is noted first."""

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

#: What libraries say where memory could not be had.
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
    """Whether `problem`, or what it came from, is that memory could not be had."""
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
    """How much fits of one model, counted in elements of the inputs. Shared by its lanes.

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
        #: The most of one batch.
        self.elements = elements
        #: Batches of at most so many rows need not be looked at: such ran before.
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
        """The most rows such as those of `inputs`, at least one."""
        if self.elements == math.inf:
            return math.inf
        return max(1, self.elements // row_elements(inputs))

    def lower(self, inputs: Tensors, rows: int) -> None:
        """Memory did not suffice for `rows` such rows: at most half of them fit."""
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
        """While `rows` such rows run."""
        elements = rows * row_elements(inputs)
        if self._notes is None or elements <= self._notes.survived:
            yield
            return
        with self._notes.trying(Size(elements, rows)):
            yield
        self._look()
