"""Measures which sizes of padded dims a model takes, and how its outputs' sizes depend on them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Signature
from inferq.workers.batching.growth import Grid, Growth, find_growth
from inferq.workers.batching.padding import Measured, PadRule
from inferq.workers.pad_probe.examples import Example, Examples, Sizes
from inferq.workers.pad_probe.trials import Trials

#: Sizes tried, one after the other, for open dims that are not padded.
OPEN_SIZES: Final = (8, 32, 224, 2, 1, 3)
#: Largest step between the sizes that a model takes.
MAX_STEP: Final = 64
#: If there are more buckets than this, some are not measured.
MAX_BUCKETS: Final = 8
#: Share of the time after which only the minimum is measured.
SHARE: Final = 0.5

Shapes = Mapping[str, tuple[int, ...]]


class SizeProbe:
    """One model's sizes.

    `base`: sizes that it takes, with the smallest bucket of each padded symbol.
    """

    def __init__(
        self,
        signature: Signature,
        rules: Mapping[str, PadRule],
        trials: Trials,
        *,
        batch: str | None,
        known: Mapping[str, int],
    ) -> None:
        self._rules = rules
        self._trials = trials
        self._examples = Examples(signature, rules)
        self._batch = batch
        self._known = known
        #: None stands for the dims without a name.
        self._open: set[str | None] = {
            dim
            for spec in signature.inputs
            for dim in spec.shape
            if not isinstance(dim, int) and (dim is None or dim != batch) and dim not in rules
        }
        self._shapes: dict[tuple[str, int], Shapes | None] = {}
        self._example: Example | None = None
        self.base: Sizes = {}
        #: Symbol → the symbols that must have the same size, including itself.
        self.ties: dict[str, tuple[str, ...]] = {}
        #: First symbol of each such group → the sizes that the engine runs.
        self.grids: dict[str, Grid] = {}
        #: Other sizes of the open dims that are not padded, if there are any.
        self.other: Sizes | None = None

    def measured(self) -> Measured:
        """Measure.

        ConfigError if the model rejects its buckets, or if its sizes cannot be explained.
        """
        self._find_base()
        grids: dict[str, Grid] = {}
        growths: dict[str, dict[int, tuple[str, Growth]]] = {}
        for symbol, rule in self._rules.items():
            if any(symbol in tied for tied in self.ties.values()):
                continue
            self.ties[symbol] = (symbol,)
            self.grids[symbol] = grid = self._grid(symbol, rule.buckets)
            found = self._growths(symbol, grid)
            for (output, axis), growth in found.items():
                known = growths.setdefault(output, {}).setdefault(axis, (symbol, growth))
                if known[0] != symbol:
                    raise ConfigError(
                        f"dim {axis} of output {output!r} depends on both pad.{known[0]} and "
                        f"pad.{symbol}, so that what padding adds cannot be cut off; expected one "
                        "of them alone, or none"
                    )
            served = self._served(grid, list(found.values()))
            grids.update(dict.fromkeys(self.ties[symbol], served))
        tied = [symbols for symbols in self.ties.values() if len(symbols) > 1]
        return Measured(grids, growths, tied)

    def _find_base(self) -> None:
        buckets = {symbol: rule.buckets[0] for symbol, rule in self._rules.items()}
        for size in OPEN_SIZES if self._open else OPEN_SIZES[:1]:
            sizes: dict[str | None, int] = {self._batch: 1}
            sizes.update(buckets)
            sizes.update(dict.fromkeys(self._open, size))
            sizes.update(
                (symbol, own) for symbol, own in self._known.items() if symbol in self._open
            )
            if self._example is not None:
                if self._run(self._example, sizes) is not None:
                    self.other = sizes
                    return
                continue
            for example in self._examples.kinds():
                if self._run(example, sizes) is not None:
                    self._example, self.base = example, sizes
                    break
        if self._example is None:
            raise ConfigError(
                f"[pad] cannot be checked: the model rejects inputs of {_shown(buckets)} "
                f"({self._trials.reason})"
            )

    def _patient(self) -> bool:
        return self._trials.within(SHARE)

    def _run(self, example: Example, sizes: Sizes) -> Mapping[str, Array] | None:
        return self._trials.outputs(self._examples.inputs(example, sizes))

    def shapes(self, symbol: str, size: int) -> Shapes | None:
        """Shapes of the outputs if `symbol` has this size; symbols not tied to it keep `base`."""
        key = symbol, size
        if key not in self._shapes:
            assert self._example is not None
            sizes = dict(self.base)
            sizes.update(dict.fromkeys(self.ties[symbol], size))
            outputs = self._run(self._example, sizes)
            self._shapes[key] = (
                None if outputs is None else {name: a.shape for name, a in outputs.items()}
            )
        return self._shapes[key]

    def _grid(self, symbol: str, buckets: Sequence[int]) -> Grid:
        step = self._step(symbol, buckets)
        alike = tuple(each for each, rule in self._rules.items() if rule.buckets == buckets)
        if step is None and len(alike) > 1:
            # Converters may give one size different names in each input.
            self.ties[symbol] = alike
            self._shapes.clear()
            step = self._step(symbol, buckets)
        step = step or max(1, buckets[-1] - buckets[0])
        for bucket in reversed(_some(buckets)):
            if bucket != buckets[-1] and not self._patient():
                break
            if self.shapes(symbol, bucket) is None:
                raise ConfigError(
                    f"pad.{symbol}.buckets has {bucket}; expected sizes that the model takes, but "
                    f"it rejects this one ({self._trials.reason})"
                )
        smaller = range(1 + (buckets[0] - 1) % step, buckets[0], step)
        if smaller and self.shapes(symbol, smaller[0]) is not None:
            first = smaller[0]
        else:
            first = (*smaller, buckets[0])[
                bisect_left(smaller, True, key=lambda n: self.shapes(symbol, n) is not None)
            ]
        grid = Grid(first, step)
        if any(bucket not in grid for bucket in buckets):
            raise ConfigError(
                f"pad.{symbol}: the model takes the sizes {grid} and the buckets "
                f"{', '.join(map(str, buckets))}, but not all that are between them; expected "
                f"buckets of which all are as those"
            )
        return grid

    def _step(self, symbol: str, buckets: Sequence[int]) -> int | None:
        """The step from the first bucket to the nearest other size that the model takes."""
        start, top = buckets[0], buckets[-1]
        nearest = (size for k in range(1, MAX_STEP + 1) for size in (start - k, start + k))
        # A dim of 1 may fit any other.
        sizes = (size for size in nearest if 1 < size <= top or (size == 1 and start <= 2))
        return next(
            (abs(size - start) for size in sizes if self.shapes(symbol, size) is not None), None
        )

    def _growths(self, symbol: str, grid: Grid) -> dict[tuple[str, int], Growth]:
        """Output → axis → growth, for sizes that are not constant."""
        buckets = self._rules[symbol].buckets
        near = {bucket - k * grid.step for bucket in _some(buckets) for k in range(2)}
        sizes = sorted(size for size in near if size >= grid.first)
        found: dict[tuple[str, int], Growth] = {}
        outputs = self.shapes(symbol, buckets[0]) or {}
        start = 0 if self._batch is None else 1
        for output, shape in outputs.items():
            for axis in range(start, len(shape)):
                measure = partial(self._size, symbol, output, axis)
                growth = find_growth(measure, grid, sizes, patient=self._patient)
                if growth is None:
                    raise ConfigError(self._unexplained(symbol, output, axis))
                if not growth.constant:
                    found[output, axis] = growth
        return found

    def _size(self, symbol: str, output: str, axis: int, size: int) -> int | None:
        shape = (self.shapes(symbol, size) or {}).get(output, ())
        return shape[axis] if axis < len(shape) else None

    def _unexplained(self, symbol: str, output: str, axis: int) -> str:
        seen = sorted(size for known, size in self._shapes if known == symbol)
        sizes = [(size, self._size(symbol, output, axis, size)) for size in seen]
        told = ", ".join(f"{size} → {out}" for size, out in sizes if out is not None)
        return (
            f"pad.{symbol}: nothing was found that explains dim {axis} of output {output!r} by "
            f"{symbol} ({told[:300]}), so that what padding adds cannot be cut off; expected no "
            f"[pad.{symbol}]"
        )

    def _served(self, grid: Grid, growths: Sequence[Growth]) -> Grid:
        """The sizes that requests may have. Sizes for which no engine was built can be padded."""
        if not self._trials.not_built or grid.step > 1:
            return grid
        smaller = range(1, grid.first)
        first = bisect_left(smaller, True, key=lambda n: all(g.at(n) > 0 for g in growths))
        return Grid(1 + first)


def _some(buckets: Sequence[int]) -> list[int]:
    """At most `MAX_BUCKETS` of them, including the first and the last."""
    if len(buckets) <= MAX_BUCKETS:
        return list(buckets)
    last = len(buckets) - 1
    return [buckets[last * n // (MAX_BUCKETS - 1)] for n in range(MAX_BUCKETS)]


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
