"""Under steady load nothing grows: a short run of `make soak`, which lasts half an hour."""

from __future__ import annotations

from soak.run import ALLOWED, Series, soak

#: Longer than results live in a short run is not possible: Redis' own keys and bytes still rise.
SECONDS = 40.0
RISING = ("Redis keys", "Redis MB")
#: Threads of a worker that share a pool of connections: it opens one more when two of them happen
#: to ask at once, which may be late in so short a run. What leaks, leaks by the dozen.
SHARING = 3
POOLED = ("worker sockets", "Redis connections")


def test_threads_connections_and_memory_stay_as_they_are() -> None:
    series, problems = soak(SECONDS, 100.0, lambda _passed, _now: None)
    assert problems == []
    assert series.keys() == ALLOWED.keys()
    grown = {
        name: each.quarters()
        for name, each in series.items()
        if name not in RISING and each.grew((SHARING, 0.0) if name in POOLED else ALLOWED[name])
    }
    assert grown == {}


def test_growth_is_found() -> None:
    flat, rising = Series([100.0] * 40), Series([100.0 + n for n in range(40)])
    assert not flat.grew((3.0, 0.0))
    assert rising.grew((3.0, 0.0))
    assert not rising.grew((3.0, 0.1))
