"""Whether a request that shared a batch was answered as it is alone.

    alone        the request by itself
    in copies    the batch once more, with copies of the request in place of its neighbours

If the answer alone differs, that is only a suspicion. Libraries compute another number of rows in
another way (other kernels, other precision), so values round differently, and a value close to a
tie falls to the other side. Among its own copies the request has the batch size and the place that
it had, but no other requests: if it is answered differently there, its neighbours made the
difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from inferq.shared.errors import FatalEngineError
from inferq.shared.schema import Array, Tensors
from inferq.workers.models.engine import Batch, RowsDiffer
from inferq.workers.row_probe.agreement import Difference, difference, typical

if TYPE_CHECKING:
    from inferq.workers.claims.runs import Outcome

#: The `scale` of `difference` for runs of equal size and place, which round alike.
SAME_SIZE: Final = 0.1
#: Largest share by which another number of rows may change an answer by rounding alone.
SLIGHT: Final = 0.01

#: Most values of one output that are compared: comparing takes ten times an output's memory.
MOST_VALUES: Final = 1 << 20

#: Runs a batch as `Lane.run` does.
Run = Callable[[Batch], Mapping[str, Array]]


class Result(StrEnum):
    """How an audit ended."""

    #: As alone, or different by no more than rounding.
    SAME = "same"
    #: Neighbours, padding or its place in the batch changed the answer.
    DIFFERENT = "different"
    #: Another number of rows changed it by more than rounding: because of a tie, or of the model.
    UNCLEAR = "unclear"
    #: The same run gave two answers.
    RANDOM = "random"
    #: The engine raised.
    FAILED = "failed"


class Evidence(msgspec.Struct, frozen=True):
    """What one audit found; `what` says by how much the answers differ, or what was raised."""

    result: Result
    what: str = ""


def has_company(outcome: Outcome, exact: bool) -> bool:
    """Whether anything but the request itself was in its run. See `examine` for `exact`."""
    run = outcome.run
    return run is not None and (run.requests > 1 or (exact and run.padding > 0))


def examine(
    run: Run, outcomes: Sequence[Outcome], place: int, exact: bool, bucket: int
) -> Evidence:
    """Examine the request at `place` of `outcomes`, which shared its run.

    `exact`: it may run with exactly its own rows; else it runs with `bucket` rows, filled up with
    copies of its last one. Raises only FatalEngineError.
    """
    company = _Company(outcomes, place)
    try:
        return _examine(run, company, exact, bucket)
    except FatalEngineError:
        raise
    except RowsDiffer as problem:
        return Evidence(Result.DIFFERENT, problem.message)
    except Exception as problem:  # noqa: BLE001 - whatever an engine raises: its request is answered
        return Evidence(Result.FAILED, str(problem) or type(problem).__name__)


def _examine(run: Run, company: _Company, exact: bool, bucket: int) -> Evidence:
    batch, alone = _alone(run, company, exact, bucket)
    found = company.difference(alone)
    if found is None:
        return Evidence(Result.SAME)
    if _difference(alone, run(batch)) is not None:
        return Evidence(Result.RANDOM, str(found))
    if company.is_shaped_otherwise(alone):
        return Evidence(Result.DIFFERENT, str(found))
    batch = company.copies()
    copies = run(batch)
    if company.difference(company.own(copies), SAME_SIZE) is not None:
        if _difference(copies, run(batch), SAME_SIZE) is not None:
            return Evidence(Result.RANDOM, str(found))
        return Evidence(Result.DIFFERENT, str(found))
    elsewhere = company.elsewhere(copies)
    if elsewhere is not None and not _is_slight(_difference(company.own(copies), elsewhere)):
        return Evidence(Result.DIFFERENT, str(found))
    return Evidence(Result.SAME if _is_slight(found) else Result.UNCLEAR, str(found))


def _alone(
    run: Run, company: _Company, exact: bool, bucket: int
) -> tuple[Batch, Mapping[str, Array]]:
    if exact:
        batch = company.alone(None)
        try:
            return batch, run(batch)
        except FatalEngineError:
            raise
        except Exception:
            if bucket == batch.rows:
                raise  # else the model may not take fewer rows than its first bucket
    batch = company.alone(bucket)
    return batch, run(batch)


def _is_slight(found: Difference | None) -> bool:
    return found is None or found.share <= SLIGHT


class _Company:
    """One request among the others of its run. This keeps the arrays of the run in memory."""

    def __init__(self, outcomes: Sequence[Outcome], place: int) -> None:
        chosen = outcomes[place]
        assert chosen.run is not None
        assert chosen.outputs is not None
        self._item = chosen.item
        #: Rows of the batch, with padding.
        self._size = chosen.run.rows + chosen.run.padding
        self._answer: Tensors = chosen.outputs
        run = [outcome for outcome in outcomes if outcome.run is chosen.run]
        self._answers = [outcome.outputs or {} for outcome in run]
        self._place = run.index(chosen)
        self._at = sum(outcome.item.rows for outcome in run[: self._place])

    def alone(self, bucket: int | None) -> Batch:
        """The request alone, with `bucket` rows; None: with its own."""
        rows = self._item.rows
        return self._batch(self._item.inputs, rows, bucket or rows, bucket is not None)

    def copies(self) -> Batch:
        """Its batch and padding, each row replaced by one of its own, with it at its place."""
        rows = self._size
        places = (np.arange(rows) - self._at) % self._item.rows
        inputs = {name: array[places] for name, array in self._item.inputs.items()}
        return self._batch(inputs, rows, rows, True)

    def _batch(self, inputs: Tensors, rows: int, bucket: int, batchable: bool) -> Batch:
        shared, computed = self._item.shared or {}, list(self._answer)
        return Batch([inputs], rows, bucket, batchable, shared, computed)

    def own(self, outputs: Tensors) -> dict[str, Array]:
        """Its rows of `outputs` of the batch."""
        return self._rows(outputs, self._at)

    def elsewhere(self, copies: Tensors) -> dict[str, Array] | None:
        """The rows of the copy that is farthest from it; None: there is no other copy."""
        rows = self._item.rows
        first = self._at % rows
        last = self._at + ((self._size - self._at) // rows - 1) * rows
        far = first if self._at - first >= last - self._at else last
        return None if far == self._at else self._rows(copies, far)

    def _rows(self, outputs: Tensors, begin: int) -> dict[str, Array]:
        end = begin + self._item.rows
        return {name: array[begin:end] for name, array in outputs.items()}

    def is_shaped_otherwise(self, outputs: Tensors) -> bool:
        """Whether `outputs` have other shapes than its answer."""
        return any(outputs[name].shape != array.shape for name, array in self._answer.items())

    def difference(self, outputs: Tensors, scale: float = 1.0) -> Difference | None:
        """How its answer differs from `outputs`, beyond what is rounding in this batch.

        A value close to 0 differs by a large share of itself. So rounding is measured against the
        typical largest value of the whole batch, where that matters.
        """
        own = _difference(outputs, self._answer, scale)
        if own is None or math.isinf(own.share) or own.cosine is None:
            return own
        found = (
            difference(
                {name: array}, _sample({name: self._answer[name]}), scale, self._typical_max(name)
            )
            for name, array in _sample(outputs).items()
        )
        return max(filter(None, found), key=lambda each: each.share, default=None)

    def _typical_max(self, name: str) -> float:
        return max(typical(_sample({name: answer[name]})[name]) for answer in self._answers)


def _difference(expected: Tensors, got: Tensors, scale: float = 1.0) -> Difference | None:
    if any(array.shape != got[name].shape for name, array in expected.items()):
        return difference(expected, got, scale)
    return difference(_sample(expected), _sample(got), scale)


def _sample(outputs: Tensors) -> dict[str, Array]:
    """`outputs`; of one with more than `MOST_VALUES` values, that many, evenly spread."""
    return {
        name: array
        if array.size <= MOST_VALUES
        else array.reshape(-1)[:: -(-array.size // MOST_VALUES)]
        for name, array in outputs.items()
    }
