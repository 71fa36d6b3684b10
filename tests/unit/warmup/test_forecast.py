"""A larger batch is expected to take what the smaller ones let expect."""

from __future__ import annotations

import pytest

from inferq.workers.warmup.forecast import IN_SERVICE, RESERVE, Forecast
from inferq.workers.warmup.limits import Gauge, Limit, Usage

MB = 1_000_000


class Process:
    def __init__(self, limit: int, gauge: Gauge = "resident") -> None:
        self.now = self.peak = 100 * MB
        self._limit, self._gauge = limit, gauge
        self.forecast = Forecast(self._read, self._left, self._forget)
        self.forecast.start()

    def _read(self) -> Usage:
        return Usage(self.now, self.peak, self.now, self.peak)

    def _left(self) -> list[Limit]:
        return [Limit("it", self._limit, self.now, self._gauge)]

    def _forget(self) -> None:
        self.peak = self.now

    def ran(self, elements: int, took: int) -> None:
        """Takes `took` beyond what it began with, and gives it back."""
        self.peak = 100 * MB + took
        self.forecast.ran(elements)


def test_what_was_taken_grows_in_proportion() -> None:
    process = Process(1000 * MB)
    process.ran(10, 50 * MB)
    assert process.forecast.growth(10, "resident") == 50 * MB
    assert process.forecast.growth(40, "resident") == 200 * MB


def test_a_rise_that_grows_faster_than_in_proportion_is_believed() -> None:
    process = Process(1000 * MB)
    process.ran(10, 10 * MB)
    process.ran(20, 60 * MB)
    assert process.forecast.growth(40, "resident") == 160 * MB


@pytest.mark.parametrize("gauge", ["resident", "mapped"])
def test_it_does_not_fit_where_it_may_take_more_than_is_left(gauge: Gauge) -> None:
    process = Process(1000 * MB, gauge)
    process.ran(10, 50 * MB)
    left = 900 * MB - RESERVE * 1000 * MB
    fits = int(left / IN_SERVICE / (5 * MB))
    assert process.forecast.short(fits) is None
    short = process.forecast.short(fits + 1)
    assert short is not None
    assert f"{IN_SERVICE * (fits + 1) * 5:.0f} MB more, and 900 of 1000 MB of it are left" in str(
        short
    )
    assert process.forecast.short(fits, factor=2.0) is not None


def test_what_is_kept_counts_once() -> None:
    """An engine that keeps its memory takes it from what is left, and needs it no more."""
    process = Process(1000 * MB)
    process.ran(10, 50 * MB)
    before = process.forecast.short(100)
    process.now += 50 * MB
    process.ran(10, 50 * MB)
    after = process.forecast.short(100)
    assert (before is None) == (after is None)
    process.ran(130, 650 * MB)
    process.now = 750 * MB
    assert process.forecast.short(130) is None
    assert process.forecast.short(135) is not None


def test_before_anything_ran_nothing_is_known() -> None:
    assert Process(1).forecast.short(1 << 40) is None
