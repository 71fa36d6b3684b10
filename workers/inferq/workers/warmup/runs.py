"""Runs a model's sizes on all its lanes before the first request, to see what fits and how fast.

    1 row, on one lane, then on all at once     what a row takes
    (of a card: each size on lane after lane    until each is warm, before it runs on all at once)
    the largest size                            if memory and time clearly suffice,
    or the next ones, up to it                  each only if what the last ones took lets it fit
    what lies between                           as long as there is time
    the best size on one lane more              as long as that makes it faster

Fast sizes are measured, beginning at the faster end. A slow size is measured by its one run. A size
that was not run does not count as slow: its time is interpolated from the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

from inferq.shared.errors import FatalEngineError
from inferq.workers.engines.tuning import Tuning, fitted
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Batch, FurtherLane, Lane, PerhapsNoMemory
from inferq.workers.models.lane_threads import LaneThreads
from inferq.workers.warmup.fit import lacks_memory, row_elements
from inferq.workers.warmup.forecast import UNSEEN, Forecast
from inferq.workers.warmup.notes import Notes, Size

logger = logging.getLogger(__name__)

#: Seconds spent on one measurement of one size, at least one run in any case.
PER_SIZE_S: Final = 0.1
#: A size whose first run took so long is measured by that run.
SLOW_S: Final = 0.5
#: Seconds after which only required sizes run; other sizes must be expected to end before.
BUDGET_S: Final = 30.0
#: Seconds after which no size is measured any more: it only runs once.
MEASURING_S: Final = 5.0
#: Two sizes in a row below this share of the fastest end the search for faster ones.
FALLING: Final = 0.9
#: If a size's first run takes less than this share of the kept time, that was measured while
#: something else ran on the machine: then all sizes are measured anew.
OUTDATED: Final = 0.8
#: How many of the fastest sizes are measured again, and how often. Other load on the machine can
#: only make a size look slow, so the best of its measurements counts.
AGAIN, ROUNDS = 3, 2
#: A lane more is kept if it serves so much as many rows as without it; else it only takes memory.
GAIN: Final = 1.05
#: Batches that take longer hide their copies with the lanes that there are.
SHORT_S: Final = 0.02
#: How many batches end while lanes are compared with one lane more, about, and how often.
COMPARED, COMPARISONS = 50, 3
#: A run that takes so many seconds is told.
LOGGED_S: Final = 1.0


@dataclass(frozen=True)
class Warmed:
    """The results of a warm-up."""

    tuning: Tuning
    #: The most rows, and the most elements of the inputs, of a batch that fits.
    rows: int
    elements: int
    #: Those that fit, with one row at least, and those that were opened besides.
    lanes: Sequence[Lane]
    #: Why not all rows do, and why not all lanes; empty: they do.
    why: str = ""
    why_lanes: str = ""


class Runs:
    """One model's warm-up. `run` does it, and raises whatever the engine raises on one row.

    `threads`: those of the lanes. `make`: a batch of so many rows. `known`: seconds of sizes that
    need not be measured. `refused`: the fewest elements of a batch that ended a process, and what
    is to be said of it. `further`: see `LoadedModel`; `lanes_known`: how many lanes are enough, 0:
    that is not known.
    """

    def __init__(
        self,
        name: str,
        lanes: Sequence[Lane],
        threads: LaneThreads,
        make: Callable[[int], Batch],
        sizes: Sequence[int],
        *,
        forecast: Forecast,
        notes: Notes | None = None,
        known: Mapping[int, float] | None = None,
        refused: tuple[int, str] | None = None,
        times: int = 1,
        further: Sequence[Callable[[], FurtherLane]] = (),
        lanes_known: int = 0,
    ) -> None:
        self._name = name
        self._lanes = list(lanes)
        self._threads = threads
        self._make = make
        self._sizes = list(sizes)
        self._forecast = forecast
        self._notes = notes
        self._known = dict(known or {})
        self._refused = refused
        #: How often a lane runs a size until it is warm. 1: all run it at once from the start.
        self._times = times
        self._further = further
        self._lanes_known = lanes_known
        #: Sizes that lanes have run.
        self._ran: list[int] = []
        #: Size → seconds of a batch, all lanes at work.
        self._seconds: dict[int, float] = {}
        self._why = self._why_lanes = ""
        #: The smallest size that was tried and does not fit.
        self._too_large = self._sizes[-1] + 1
        #: When `run` was called (monotonic s).
        self._began = 0.0

    def run(self) -> Warmed:
        """Do the warm-up, however long it takes."""
        self._began = time.monotonic()
        self._forecast.start()
        self._first()
        tried = [self._sizes[0]]
        while (size := self._larger(tried[-1])) is not None:
            if self._try(size):
                tried.append(size)
            else:
                self._too_large = size
        fits = self._fits(tried[-1])
        self._between([size for size in self._sizes if size < tried[-1] and size not in tried])
        self._measure()
        if not self._why and not self._why_lanes:
            self._add_lanes()
        usable = tuple(size for size in self._sizes if size <= fits)
        seconds = {size: taken for size, taken in self._seconds.items() if size <= fits}
        return Warmed(
            Tuning(seconds, usable, len(self._lanes)),
            fits,
            self._elements(fits),
            tuple(self._lanes),
            self._why,
            self._why_lanes,
        )

    def also(self, make: Callable[[int], Batch], sizes: Sequence[int]) -> None:
        """Run further optimum inputs, of `sizes`, as far as they fit. After `run`."""
        for size in sizes:
            batch = make(size)
            if self._forecast.short(self._at_once(batch)) is None:
                self._note(batch, lambda batch=batch: self._again(batch))  # type: ignore[misc]

    def _again(self, batch: Batch) -> None:
        self._warm(batch)
        self._together(batch)

    # --- what is tried ----------------------------------------------------------------------

    def _first(self) -> None:
        """The smallest size, on one lane, then on as many as fit."""
        size = self._sizes[0]
        batch = self._make(size)
        lanes = self._lanes
        self._lanes = lanes[:1]
        self._run_once(batch)
        one = self._elements(size)
        self._forecast.ran(one)
        fitting = len(lanes)
        while fitting > 1 and (short := self._forecast.short(one * fitting)) is not None:
            fitting -= 1
            self._why_lanes = f"{fitting + 1} lanes of {size} rows would take {short}"
        self._lanes = lanes[:fitting]
        if fitting > 1:
            self._note(batch, lambda: self._run_once(batch))
            self._forecast.ran(one * fitting)

    def _larger(self, last: int) -> int | None:
        """The next size to try: the largest that surely fits memory and time, or else the next.

        None: there is none, or it does not fit.
        """
        larger = [size for size in self._sizes if size > last and self._is_allowed(size)]
        if not larger:
            return None
        for size in reversed(larger):
            if self._takes(size) and self._short(size, UNSEEN) is None:
                return size
        short = self._short(larger[0])
        if short is not None:
            self._why = f"{larger[0]} would take {short}"
            return None
        # At least two points are needed to estimate what a larger batch takes.
        return larger[0] if self._takes(larger[0]) or len(self._seconds) < 2 else None

    def _is_allowed(self, size: int) -> bool:
        if size >= self._too_large:
            return False
        if self._refused is None or self._elements(size) < self._refused[0]:
            return True
        self._why = self._refused[1]
        return False

    def _takes(self, size: int) -> bool:
        """Whether there is time for it."""
        left = BUDGET_S - (time.monotonic() - self._began)
        known = self._known.get(size)
        return (known if known is not None else fitted(self._seconds).at(size)) <= left

    def _try(self, size: int) -> bool:
        """Run `size` on all lanes for the first time. False if it does not fit."""
        batch = self._make(size)
        try:
            self._note(batch, lambda: self._run_once(batch))
        except FatalEngineError:
            raise
        except Exception as problem:
            if not (isinstance(problem, PerhapsNoMemory) or lacks_memory(problem)):
                raise
            self._seconds.pop(size, None)
            self._why = f"there is no memory for {size} ({problem})"
            return False
        self._forecast.ran(self._at_once(batch))
        short = self._short(size)
        if short is not None:
            self._why = f"{size} take, as batches of changing sizes, {short}"
            return False
        return True

    def _between(self, sizes: Sequence[int]) -> None:
        """Run each size once, as long as there is time."""
        for size in sizes:
            if self._takes(size):
                batch = self._make(size)
                self._note(batch, lambda batch=batch: self._run_once(batch))  # type: ignore[misc]

    def _fits(self, last: int) -> int:
        """The largest size that fits, after `last` ran. Sizes without time to run count, too."""
        if self._why:
            return last
        fits = last
        for size in self._sizes:
            if size > last:
                if not self._is_allowed(size):
                    break
                short = self._short(size)
                if short is not None:
                    self._why = f"{size} would take {short}"
                    break
                fits = size
        return fits

    # --- how it is run ----------------------------------------------------------------------

    def _note(self, batch: Batch, run: Callable[[], object]) -> None:
        elements = batch.bucket * row_elements(batch.parts[0])
        noted = self._notes is not None and batch.rows > 1 and elements > self._notes.survived
        size = Size(elements, batch.rows)
        with self._notes.trying(size) if noted and self._notes is not None else nullcontext():
            run()

    def _run_once(self, batch: Batch) -> None:
        """On all lanes, warm, at once."""
        self._warm(batch)
        self._ran.append(batch.rows)
        self._seconds[batch.rows] = seconds = self._together(batch)
        if seconds >= LOGGED_S:
            logger.info(
                "model %s warms up: a batch of %d rows took %.1f s",
                self._name,
                batch.rows,
                seconds,
                extra=about(model=self._name),
            )

    def _warm(self, batch: Batch) -> None:
        """One lane after the other, as often as it needs to be warm, unless it takes long.

        A lane on a card captures graphs meanwhile, which another's first run would spoil. What the
        first run takes tells nothing: it may load and compile.
        """
        for lane in self._lanes if self._times > 1 else ():
            for number in range(self._times):
                started = time.monotonic()
                self._threads.each([lane], lambda _, lane=lane: lane.run(batch))  # type: ignore[misc]
                if number and time.monotonic() - started >= SLOW_S:
                    break

    def _measure(self) -> None:
        """Measure fast sizes, from the faster end on, until the rest is clearly slower."""
        fast = sorted(size for size, taken in self._seconds.items() if taken < SLOW_S)
        if any(taken < OUTDATED * self._known.get(n, 0.0) for n, taken in self._seconds.items()):
            logger.info(
                "model %s is measured anew: it runs faster than it did at an earlier start",
                self._name,
                extra=about(model=self._name),
            )
            self._known = {}
        # Sizes that an earlier start left out among those that it measured are left out again.
        seen = max(self._known, default=0)
        for size in fast:
            if size < seen and size not in self._known:
                del self._seconds[size]
        self._seconds |= {n: self._known[n] for n in self._seconds.keys() & self._known.keys()}
        fast = [size for size in fast if size > seen]
        if len(self._sizes) < 2 or not fast:
            return
        measured = self._rates(fast)
        # First runs allocate and compile, so they say nothing about sizes that were left out.
        for size in set(fast) - measured:
            del self._seconds[size]

    def _rates(self, fast: list[int]) -> Set[int]:
        """Measure these sizes, ascending, as long as it is worthwhile. Returns those measured."""
        until = time.monotonic() + MEASURING_S
        rates: dict[int, float] = {}

        def rate(size: int) -> None:
            if time.monotonic() < until or size not in rates:
                taken = self._rate(size)
                self._seconds[size] = min(taken, self._seconds[size]) if size in rates else taken
                rates[size] = size / self._seconds[size]

        for size in {fast[0], fast[-1]}:
            rate(size)
        inner, falling = fast[1:-1], 0
        if rates[fast[-1]] > rates[fast[0]]:
            inner.reverse()
        for size in inner:
            if falling == 2 or time.monotonic() >= until:
                break
            rate(size)
            falling = falling + 1 if rates[size] < FALLING * max(rates.values()) else 0
        for size in sorted(rates, key=lambda size: -rates[size])[:AGAIN] * ROUNDS:
            if len(rates) > 1:
                rate(size)
        return rates.keys()

    def _add_lanes(self) -> None:
        """One after the other, as long as each makes the best size faster, or as many as did so at
        an earlier start.
        """
        for opens in self._further:
            if self._lanes_known and len(self._lanes) >= self._lanes_known:
                return
            size = Tuning(self._seconds, tuple(sorted(self._seconds)), len(self._lanes)).best
            if self._seconds[size] >= SHORT_S:
                return
            try:
                lane = opens()
            except FatalEngineError:
                raise
            except Exception as problem:  # noqa: BLE001 - it is one that nobody asked for
                logger.info("model %s: no lane more: %s", self._name, problem)
                return
            asked_for = list(self._lanes)
            try:
                gains = self._gains(lane, size)
            except FatalEngineError:
                raise
            except Exception as problem:  # noqa: BLE001 - the others serve without it
                logger.warning("model %s: no lane more, it failed: %s", self._name, problem)
                gains = False
            if not gains:
                self._lanes = asked_for
                lane.close()
                return

    def _gains(self, lane: Lane, size: int) -> bool:
        """Add `lane`, warm. False: it serves hardly more rows than the others without it do."""
        alone, self._lanes = self._lanes, [lane]
        for each in dict.fromkeys([size, *self._ran]):
            self._warm(self._make(each))
        self._lanes = [*alone, lane]
        if self._lanes_known:
            return True
        before, after = len(alone) / self._seconds[size], 0.0
        for _ in range(COMPARISONS):
            before = max(before, self._served(size, alone))
            after = max(after, self._served(size, self._lanes))
        if after < GAIN * before:
            return False
        # What was measured with fewer lanes at work takes longer now, all of it alike.
        grown = len(self._lanes) / after / self._seconds[size]
        self._seconds = {rows: taken * grown for rows, taken in self._seconds.items()}
        return True

    def _served(self, size: int, lanes: Sequence[Lane]) -> float:
        """Batches of `size` that end in a second, `lanes` at work."""
        batch = self._make(size)
        lasts = max(PER_SIZE_S, COMPARED * self._seconds[size] / len(lanes))
        until = time.monotonic() + lasts
        counts = [0] * len(lanes)

        def drive(number: int) -> None:
            while True:
                lanes[number].run(batch)
                if time.monotonic() >= until:
                    return
                counts[number] += 1

        self._threads.each(lanes, drive)
        return sum(counts) / lasts

    def _rate(self, size: int) -> float:
        """Seconds of a batch of `size`, all lanes at work."""
        batch = self._make(size)
        count, started = 0, time.monotonic()
        counts = [0] * len(self._lanes)

        def drive(number: int) -> None:
            while not counts[number] or time.monotonic() - started < PER_SIZE_S:
                self._lanes[number].run(batch)
                counts[number] += 1

        self._threads.each(self._lanes, drive)
        count = sum(counts)
        return (time.monotonic() - started) * len(self._lanes) / count

    def _together(self, batch: Batch) -> float:
        """Run `batch` once on every lane, all at once. Returns the seconds that took."""
        started = time.monotonic()
        self._threads.each(self._lanes, lambda number: self._lanes[number].run(batch))
        return time.monotonic() - started

    def _elements(self, size: int) -> int:
        batch = self._make(size)
        return batch.bucket * row_elements(batch.parts[0])

    def _at_once(self, batch: Batch) -> int:
        return len(self._lanes) * batch.bucket * row_elements(batch.parts[0])

    def _short(self, size: int, factor: float | None = None) -> object:
        elements = len(self._lanes) * self._elements(size)
        if factor is None:
            return self._forecast.short(elements)
        return self._forecast.short(elements, factor)
