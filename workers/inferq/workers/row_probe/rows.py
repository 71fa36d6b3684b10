"""Finds out, by running a model, whether its rows are independent of each other.

If they were not, one request's answer would depend on the other requests of its batch. Five rows of
each kind (`examples`) are run in several batches:

- *among other rows*: a row at the same place of batches of the same size. The same instructions
  compute it, so its answer must be the same almost to the bit: a dependence of 0.01 % shows;
- *at other places and in other sizes*, alone too: the answers may differ by rounding;
- *beside equal rows*, and with rows of very different magnitude.

A model may amplify rounding: magika's answers on bytes of 0 and 1 differ by 2 % between one row and
several, and by 0.00002 % on all other inputs. A small difference between a row alone and the row
among others counts as amplified rounding if another kind shows none. None of this is a proof.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

from inferq.shared.schema import Array, Tensors, TensorSpec
from inferq.workers.row_probe.agreement import Difference, difference, typical
from inferq.workers.row_probe.examples import ROWS, UNIT, Kind, further_kinds, rows_of, shapes_of

logger = logging.getLogger(__name__)

#: Runs the model on these inputs; raises whatever the engine raises.
Probe = Callable[[Tensors], Mapping[str, Array]]

#: Sizes tried, one after the other, for all dims of unknown size.
SIZES: Final = (32, 224, 8, 128, 64, 16, 1, 2, 4, 256, 512, 640)
#: The scale of rounding between runs of equal shapes.
EXACT: Final = 0.01
#: Amplified rounding is at most this share of the largest value.
AMPLIFIED: Final = 0.03
#: One kind counts for another if its values are at most so many times as large.
ALIKE: Final = 10.0
#: Rows of larger batches, and the seconds of CPU within which three rows must have run for such a
#: batch to be tried: what runs long takes much memory, too.
LARGER: Final = ((5, 0.1), (35, 0.02))
#: Seconds of CPU after which only the most telling runs are made.
BUDGET_S: Final = 0.5
#: Seconds of CPU after which no more runs are made at all, except of the first two kinds.
MAX_S: Final = 10.0


@dataclass(frozen=True)
class Shown:
    """What the runs showed of a model's outputs."""

    #: Output → number of dims.
    dims: Mapping[str, int]
    #: Output whose dim 0 does not follow the rows → what it is instead.
    unbatched: Mapping[str, str]
    #: How answers depend on the other rows; empty: they do not.
    differences: Sequence[Difference]
    #: Outputs that vary from run to run: only their shapes were compared.
    varying: Sequence[str]


class NotShown(Exception):
    """The model could not be run in a way that shows anything; the text says why."""


def show(inputs: Sequence[TensorSpec], known: Mapping[str, int], probe: Probe) -> Shown:
    """Run the model on examples. `known`: symbol → size of an open dim. Raises NotShown."""
    open_dims = any(
        not isinstance(dim, int) and dim not in known for spec in inputs for dim in spec.shape[1:]
    )
    problem = "an example would be too large"
    for size in SIZES if open_dims else SIZES[:1]:
        shapes = shapes_of(inputs, size, known)
        if shapes is None:
            continue
        study = _Study(probe)
        study.attempt(rows_of(UNIT, inputs, shapes), UNIT)
        if len(study.sizes) < 2:
            problem = study.problem or problem
            continue
        for number, kinds in enumerate(further_kinds(inputs)):
            if study.is_settled or (number and study.is_late):
                break
            for kind in kinds:
                if study.attempt(rows_of(kind, inputs, shapes), kind):
                    break
        return study.shown()
    raise NotShown(problem)


class _Study:
    """The runs of one model and their results so far."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._began = time.process_time()
        self._runs = 0
        #: Seconds of CPU that the kind's first batch took.
        self._took_s = 0.0
        #: The batch sizes that were run.
        self.sizes: set[int] = set()
        #: What the model last raised.
        self.problem = ""
        self._dims: dict[str, int] = {}
        self._unbatched: dict[str, str] = {}
        self._differences: list[Difference] = []
        self._varying: set[str] = set()
        #: Output → its largest value on rows of the first kind, which is typical.
        self._typical_max: dict[str, float] = {}
        #: Output → how a row alone differs, and all answers to rows of that kind.
        self._alone: dict[str, list[tuple[Difference, Array]]] = defaultdict(list)
        #: Output → the largest value of each kind on which a row alone does not differ.
        self._steady: dict[str, list[float]] = defaultdict(list)

    @property
    def is_late(self) -> bool:
        """Whether it has taken long and nothing is open that a further kind could explain."""
        passed = time.process_time() - self._began
        return passed > BUDGET_S and (passed > MAX_S or not self._unexplained())

    @property
    def is_settled(self) -> bool:
        """Whether no further run could change the result."""
        return bool(self._unbatched)

    def shown(self) -> Shown:
        logger.debug("%d runs in %.2f s", self._runs, time.process_time() - self._began)
        found = self._differences + self._unexplained()
        differences = [each for each in found if each.output not in self._varying]
        return Shown(self._dims, self._unbatched, differences, sorted(self._varying))

    def _unexplained(self) -> list[Difference]:
        """How rows alone differ, without amplified rounding."""
        return [
            each
            for name, alone in self._alone.items()
            for each, answers in alone
            if not self._is_amplified(name, each, answers)
        ]

    def _is_amplified(self, name: str, alone: Difference, answers: Array) -> bool:
        """Whether the difference of a row alone is rounding that the model amplified."""
        # An index changes or does not: there is no small difference.
        little = answers.dtype.kind not in "fc" or alone.share <= AMPLIFIED
        most = ALIKE * typical(answers)
        return little and any(largest <= most for largest in self._steady[name])

    def attempt(self, rows: Tensors, kind: Kind) -> bool:
        """Run batches of `rows`. False if the model rejects them."""
        began = time.process_time()
        base, width = None, 0
        # Some programs take at most two rows, and large examples have only three.
        five = len(next(iter(rows.values()))) == ROWS
        for width in (3, 2) if five else (2,):
            base = self._run(rows, range(width))
            if base is not None:
                break
        if base is None:
            return False
        self._took_s = time.process_time() - began
        if self._differences:
            return True  # equal answers of all rows would still matter
        if kind is UNIT:
            self._typical_max = {name: typical(array) for name, array in base.items()}
        others, last = range(width, 2 * width - 1), width - 1
        alone = [self._by_itself(rows, base, 0)]
        self._in_company(rows, base, (0, *others), 0)
        self._in_company(rows, base, (*others, last), last)
        more = kind.name in ("unit", "mixed") and not self.is_late
        if self._differences or more:
            # If they differ, measure by how much on more than one row.
            alone += [self._by_itself(rows, base, row) for row in range(1, width)]
        if more and not self._differences:
            for attempt in self._further(rows, base, width):
                attempt()
                if self.is_late:
                    break
        self._weigh(base, alone)
        return True

    def _further(self, rows: Tensors, base: Tensors, width: int) -> Iterator[Callable[[], object]]:
        """Further runs of a kind, one after the other."""
        yield partial(self._in_company, rows, base, (0,) * width, 0)
        yield partial(self._elsewhere, rows, base, (*range(1, width), 0))
        if width == 2:
            return
        yield partial(self._in_company, rows, base, (4, 1, 3), 1)
        yield partial(self._elsewhere, rows, base, (1, 0))
        for size, limit_s in LARGER:
            if self._took_s < limit_s:
                yield partial(self._of_many, rows, base, size)

    def _of_many(self, rows: Tensors, base: Tensors, size: int) -> None:
        """Rows may depend on each other only in larger batches."""
        larger = self._elsewhere(rows, base, (3, 0, 4, 2, 1) * (size // ROWS))
        if larger is not None:
            self._in_company(rows, larger, (*(1,) * (size - 2), 2, 1), size - 2)
            self._in_company(rows, larger, (2, 0, *(2,) * (size - 2)), 1)

    def _weigh(self, base: Tensors, alone: Sequence[Mapping[str, Difference | None]]) -> None:
        for name in base.keys() - self._unbatched.keys() - self._varying:
            compared = [differences[name] for differences in alone if name in differences]
            found = [each for each in compared if each is not None]
            self._alone[name] += [(each, base[name]) for each in found]
            if compared and not found and _tells_apart(base[name]):
                self._steady[name].append(typical(base[name]))

    # --- running ----------------------------------------------------------------------------

    def _run(self, rows: Tensors, chosen: Sequence[int]) -> Tensors | None:
        """The outputs of a batch of the `chosen` rows; None if the model raises."""
        index = list(chosen)
        try:
            outputs = self._probe({name: array[index] for name, array in rows.items()})
        except Exception as problem:  # noqa: BLE001 - an error shows nothing about the rows
            self.problem = str(problem)
            logger.debug("a batch of %d rows failed: %s", len(index), problem)
            return None
        self._runs += 1
        self.sizes.add(len(index))
        for name, array in outputs.items():
            self._dims[name] = array.ndim
            if array.ndim == 0 or len(array) != len(index):
                self._unbatched.setdefault(name, f"{list(array.shape)} of {len(index)} rows")
        return outputs

    def _in_company(self, rows: Tensors, base: Tensors, chosen: Sequence[int], place: int) -> None:
        """Compare the answer at `place` of `base` with that in a batch of the same size.

        The row there is the same; the other rows differ.
        """
        got = self._run(rows, chosen)
        if got is not None:
            again = cache(lambda: self._run(rows, chosen))
            self._differences += [
                found
                for name in self._comparable(got)
                if (found := self._differs(name, base, place, got, place, EXACT, again))
            ]

    def _elsewhere(self, rows: Tensors, base: Tensors, chosen: Sequence[int]) -> Tensors | None:
        """Compare the answers to `chosen` rows with those in `base`, a batch of the first rows."""
        got = self._run(rows, chosen)
        if got is None:
            return None
        again = cache(lambda: self._run(rows, chosen))
        for name in self._comparable(got):
            for place, row in enumerate(chosen):
                if row < len(base[name]):
                    found = self._differs(name, base, row, got, place, 1.0, again)
                    self._differences += [found] if found is not None else []
        return got

    def _by_itself(self, rows: Tensors, base: Tensors, row: int) -> dict[str, Difference | None]:
        got = self._run(rows, (row,))
        if got is None:
            return {}
        again = cache(lambda: self._run(rows, (row,)))
        return {
            name: self._differs(name, base, row, got, 0, 1.0, again)
            for name in self._comparable(got)
        }

    # --- comparing --------------------------------------------------------------------------

    def _comparable(self, outputs: Tensors) -> list[str]:
        return [
            name for name in outputs if name not in self._unbatched and name not in self._varying
        ]

    def _differs(
        self,
        name: str,
        base: Tensors,
        row: int,
        got: Tensors,
        place: int,
        scale: float,
        again: Callable[[], Tensors | None],
    ) -> Difference | None:
        """How `got` at `place` differs from `base` at `row` by more than from a second run."""
        right, seen = base[name][row : row + 1], got[name][place : place + 1]
        typical_max = self._typical_max.get(name, 0.0)
        found = difference({name: right}, {name: seen}, scale, typical_max)
        if found is None:
            return None
        repeated = again()
        if repeated is None or name in self._unbatched:
            return None
        same = repeated[name][place : place + 1]
        if difference({name: seen}, {name: same}, scale, typical_max) is None:
            return found
        if difference({name: seen}, {name: same}, 1.0, typical_max) is None:
            # It rounds differently from run to run.
            return difference({name: right}, {name: seen}, 1.0, typical_max)
        self._varying.add(name)
        return None


def _tells_apart(array: Array) -> bool:
    """Whether rows have different answers: equal ones show nothing."""
    return len(array) > 1 and difference({"": array[:1]}, {"": array[1:2]}) is not None
