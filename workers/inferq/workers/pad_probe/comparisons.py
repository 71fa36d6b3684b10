"""Compares a model's answers to padded inputs, after cutting, with those to unpadded inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from inferq.shared.schema import DTYPES, Array, Signature, Tensors
from inferq.workers.batching.growth import Grid
from inferq.workers.batching.padding import Measured, Padding, PadRule
from inferq.workers.pad_probe.examples import Example, Examples, Sizes
from inferq.workers.pad_probe.sizes import SizeProbe
from inferq.workers.pad_probe.trials import Trials
from inferq.workers.row_probe.agreement import Difference, difference, typical

#: Neighbouring sizes that are compared, since borders may affect each one differently.
NEIGHBOURS: Final = 9
#: A change below this share of an output's largest value must show with other inputs, too.
SMALL: Final = 0.03
#: Kinds of inputs that are compared at all sizes.
ALWAYS: Final = 3
#: Number of further inputs if an output is an index or a flag, which few changes alter; each is
#: STRIDE sizes further.
LABELS, STRIDE = 120, 7


@dataclass(frozen=True)
class Case:
    """One comparison."""

    sizes: Sizes
    example: Example
    #: The symbols that are padded in this case.
    padded: tuple[str, ...]
    #: It is compared however long that takes.
    needed: bool = False
    #: Seed of the random values.
    seed: int = 0


@dataclass(frozen=True)
class Changed:
    """A case whose answers padding changed."""

    case: Case
    buckets: Mapping[str, int]
    by: Difference | str

    @property
    def small(self) -> bool:
        return isinstance(self.by, Difference) and self.by.share < SMALL

    @property
    def is_measured(self) -> bool:
        """Whether it gives a size of the change."""
        return isinstance(self.by, Difference) and self.by.cosine is not None

    def __str__(self) -> str:
        sizes = " and ".join(
            f"{symbol} {self.case.sizes[symbol]} is padded to {self.buckets[symbol]}"
            for symbol in self.case.padded
        )
        return f"where {sizes}, on {self.case.example.kind}: {self.by}"


class Comparisons:
    """The comparisons of one model with one set of rules."""

    def __init__(
        self,
        signature: Signature,
        rules: Mapping[str, PadRule],
        measured: Measured,
        taken: SizeProbe,
        trials: Trials,
        *,
        rounding: float = 1.0,
    ) -> None:
        self.rules = rules
        self.padding = Padding(signature, rules, measured)
        self._taken = taken
        self._trials = trials
        self._examples = Examples(signature, rules)
        self._rounding = rounding
        self._kinds = self._examples.kinds()
        #: Whether an output is an index or a flag.
        self._labels = any(DTYPES[spec.dtype].kind not in "fc" for spec in signature.outputs)
        #: Output → the typical largest value, of inputs that are neither large nor small.
        self._typical_max: dict[str, float] = {}
        #: Symbol → number of comparisons in which it was padded.
        self.made = dict.fromkeys(rules, 0)
        #: Comparisons that were left out for lack of time.
        self.left_out = 0

    def first_change(self) -> Changed | None:
        """The first case found in which answers change; None: there is none."""
        for case in self._cases():
            if not case.needed and not self._trials.within(1.0):
                self.left_out += 1
                continue
            changed = self.compare(case)
            if changed is not None and (not changed.small or self._confirmed(changed)):
                return self._measured_best(changed)
        return None

    def _confirmed(self, changed: Changed) -> bool:
        """Whether other inputs show it, too: where values cancel out, rounding is amplified."""
        return any(
            self.compare(replace(changed.case, example=example)) is not None
            for example in self._kinds
            if example is not changed.case.example
        )

    def _measured_best(self, changed: Changed) -> Changed:
        """The same change, if possible with inputs for which its size can be given."""
        for example in self._kinds:
            if changed.is_measured:
                break
            changed = self.compare(replace(changed.case, example=example)) or changed
        return changed

    def compare(self, case: Case) -> Changed | None:
        """The change by padding; None: there is none, or the model rejects even unpadded inputs."""
        inputs = self._examples.inputs(case.example, case.sizes, case.seed)
        alone = self._trials.outputs(inputs)
        if inputs is None or alone is None:
            return None
        if case.example is self._kinds[0]:
            self._note_typical_max(alone)
        padded, sizes = self.padding.apply(inputs)
        buckets = {
            symbol: self.rules[symbol].bucket(case.sizes[symbol]) or 0 for symbol in case.padded
        }
        answer = self._trials.outputs(padded)
        if answer is None:
            return Changed(case, buckets, f"the model fails ({self._trials.reason})")
        found = self._difference(inputs, alone, self.padding.cut(answer, sizes))
        if any(a.dtype.kind not in "fc" or np.isfinite(a).any() for a in alone.values()):
            for symbol in case.padded:
                self.made[symbol] += 1
        return Changed(case, buckets, found) if found is not None else None

    def _difference(self, inputs: Tensors, alone: Tensors, answer: Tensors) -> Difference | None:
        if all(a.size > 1 and (a == a.flat[0]).all() for a in inputs.values()):
            # If all values are equal, rounding decides which one an index names.
            alone = {
                name: a
                for name, a in alone.items()
                if a.dtype.kind in "fc" or a.shape != answer[name].shape
            }
        found = self._largest(alone, answer)
        if found is None:
            return None
        again = self._trials.outputs(inputs)
        if again is None:
            return found
        # Of an output that varies from run to run only the shape can be compared.
        steady = {
            name: a
            for name, a in alone.items()
            if a.shape != answer[name].shape or self._largest({name: a}, again) is None
        }
        return self._largest(steady, answer)

    def _largest(self, expected: Tensors, got: Tensors) -> Difference | None:
        """The largest difference of any output, measured by each output's typical largest value."""
        found = [
            difference({name: array}, got, self._rounding, self._typical_max.get(name, 0.0))
            for name, array in expected.items()
        ]
        differing = [each for each in found if each is not None]
        return max(differing, key=lambda each: each.share, default=None)

    def _note_typical_max(self, outputs: Mapping[str, Array]) -> None:
        for name, array in outputs.items():
            if array.dtype.kind in "fc":
                values = np.abs(array[np.isfinite(array) & (array != 0)])
                if values.size:
                    typical_max = min(float(np.median(values)), typical(values))
                    self._typical_max[name] = max(typical_max, self._typical_max.get(name, 0.0))

    def _cases(self) -> Iterator[Case]:  # noqa: C901 - a list of loops
        taken, kinds = self._taken, self._kinds
        within = {name: _within(self.rules[name], grid) for name, grid in taken.grids.items()}
        usable = {symbol: found for symbol, found in within.items() if found}
        near = {symbol: found[0][-1] for symbol, found in usable.items()}

        def case(
            example: Example,
            sizes: Mapping[str, int],
            *,
            base: Sizes = taken.base,
            needed: bool = False,
            seed: int = 0,
        ) -> Case:
            changed = {each: size for name, size in sizes.items() for each in taken.ties[name]}
            at: dict[str | None, int] = dict(base)
            at.update(changed)
            return Case(at, example, tuple(changed), needed=needed, seed=seed)

        for example in kinds:
            for symbol, size in near.items():
                yield case(example, {symbol: size}, needed=example in kinds[:2])
            if len(near) > 1:
                yield case(example, near, needed=example is kinds[0])
        for example, (symbol, found) in itertools.product(kinds[:ALWAYS], usable.items()):
            some = {*found[0][-NEIGHBOURS:], found[0][len(found[0]) // 2], found[0][0]}
            for size in some - {near[symbol]}:
                yield case(example, {symbol: size})
        for example, (symbol, found) in itertools.product(kinds[:ALWAYS], usable.items()):
            for size in itertools.chain.from_iterable(map(_of_three, found[1:])):
                yield case(example, {symbol: size})
        for seed, (symbol, found) in itertools.product(
            range(1, LABELS + 1 if self._labels else 1), usable.items()
        ):
            sizes = found[seed % len(found)]
            size = sizes[seed * STRIDE % len(sizes)]
            yield case(kinds[seed % len(kinds)], {symbol: size}, seed=seed)
        if taken.other is not None:
            for symbol, size in near.items():
                yield case(kinds[0], {symbol: size}, base=taken.other)


def _of_three(sizes: range) -> set[int]:
    """The largest, one from the middle, and the smallest."""
    return {sizes[-1], sizes[len(sizes) // 2], sizes[0]}


def _within(rule: PadRule, grid: Grid) -> list[range]:
    """For each bucket to which any size is padded: these sizes."""
    found: list[range] = []
    least = grid.first
    for bucket in rule.buckets:
        sizes = range(least, bucket, grid.step)
        if sizes:
            found.append(sizes)
        least = bucket + grid.step
    return found
