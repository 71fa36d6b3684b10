"""What to send and when: by a number of requests in flight, a rate, or a trace of send times.

Command-line values become `Load`s. In each process a `Load` becomes the times at which that
process' share of the requests is due. All shares together are exactly the load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from inferq.shared.errors import ConfigError

Kind = Literal["concurrency", "rate", "trace"]
Distribution = Literal["poisson", "constant"]

MAX_CONCURRENCY: Final = 65_536
#: Requests/s.
MIN_RATE: Final = 0.001
MAX_RATE: Final = 1_000_000.0
MAX_STEPS: Final = 100
#: Bytes and lines of a trace; its last time, in seconds.
MAX_TRACE_BYTES: Final = 128 * 1024 * 1024
MAX_TRACE: Final = 2_000_000
MAX_TRACE_S: Final = 86_400.0
#: A trace that lasts less is sent all at once.
SHORTEST_S: Final = 1e-6
#: Gaps drawn at once.
_DRAWN: Final = 256


class Load(msgspec.Struct, frozen=True):
    """One step's load."""

    kind: Kind
    #: Requests in flight; requests/s; for a trace its mean requests/s.
    value: float
    distribution: Distribution = "constant"
    #: A trace's send times: seconds after the first.
    times: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


def concurrencies(text: str) -> list[Load]:
    """The loads of ``--concurrency``. ConfigError."""
    values = _values("--concurrency", text, 1, MAX_CONCURRENCY)
    for value in values:
        if value != int(value):
            raise ConfigError(f"--concurrency {text!r}: {value:g}; expected whole numbers")
    return [Load("concurrency", value) for value in values]


def rates(text: str, distribution: Distribution) -> list[Load]:
    """The loads of ``--rate``. ConfigError."""
    values = _values("--rate", text, MIN_RATE, MAX_RATE)
    return [Load("rate", value, distribution) for value in values]


def read_trace(path: Path) -> Load:
    """The load of ``--trace``: one send time in seconds per line, ascending. ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TRACE_BYTES + 1)
    except OSError as problem:
        raise ConfigError(f"--trace {path} cannot be read: {problem.strerror or problem}") from None
    if len(data) > MAX_TRACE_BYTES:
        raise ConfigError(f"--trace {path} is too large; expected at most {MAX_TRACE_BYTES} bytes")
    times: list[float] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        where = f"--trace {path}, line {number}: {text[:40]!r}"
        time = _number(text)
        if time is None or time < 0:
            raise ConfigError(f"{where}; expected a time in seconds, 0 or more")
        if times and time < times[-1]:
            raise ConfigError(f"{where}; expected at least {times[-1]:g}, as the line before")
        times.append(time)
        if len(times) > MAX_TRACE:
            raise ConfigError(f"{where}; expected at most {MAX_TRACE} times")
    if not times:
        raise ConfigError(f"--trace {path} is empty; expected one time in seconds per line")
    lasts = times[-1] - times[0]
    if lasts > MAX_TRACE_S:
        raise ConfigError(f"--trace {path} lasts {lasts:g} s; expected at most {MAX_TRACE_S:g} s")
    shifted = tuple(time - times[0] for time in times)
    return Load("trace", len(times) / lasts if lasts >= SHORTEST_S else len(times), times=shifted)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _values(option: str, text: str, least: float, most: float) -> list[float]:
    """``8``, ``1,2,4``, ``100:500:100`` and ``1:64:2x``, and lists of those."""
    values: list[float] = []
    for part in text.split(","):
        where = f"{option} {text!r}: {part!r}"
        values += _range(where, part, least, most)
        if len(values) > MAX_STEPS:
            raise ConfigError(f"{where} makes too many steps; expected at most {MAX_STEPS}")
    return values


def _range(where: str, part: str, least: float, most: float) -> list[float]:
    expected = "expected a number, or START:END:STEP as in 100:500:100 or 1:64:2x"
    pieces = part.strip().split(":")
    if len(pieces) not in (1, 3):
        raise ConfigError(f"{where}; {expected}")
    times = len(pieces) == 3 and pieces[2].endswith("x")
    if times:
        pieces[2] = pieces[2].removesuffix("x")
    numbers = [_number(piece) for piece in pieces]
    start, end, step = (numbers * 3)[:3] if len(numbers) == 1 else numbers
    if start is None or end is None or step is None:
        raise ConfigError(f"{where}; {expected}")
    for value in (start, end):
        if not least <= value <= most:
            raise ConfigError(f"{where}: {value:g}; expected {least:g} to {most:g}")
    if start > end:
        raise ConfigError(f"{where}: {start:g} to {end:g}; expected the smaller first")
    if len(pieces) == 1:
        return [round(start, 9)]
    if step <= (1 if times else 0):
        wanted = "a factor above 1" if times else "a step above 0"
        raise ConfigError(f"{where}: {pieces[2]}; expected {wanted}")
    steps = (start * step**n if times else start + step * n for n in range(MAX_STEPS + 1))
    return [round(value, 9) for value in takewhile(lambda value: value <= end * (1 + 1e-9), steps)]


def due_times(load: Load, share: int, shares: int, seed: Sequence[int]) -> Iterator[float]:
    """Seconds after the step's begin at which requests of one of `shares` are due, ascending.

    `share` counts from 0. Endless but for a trace. A closed loop has no such times.
    """
    if load.kind == "trace":
        return iter(load.times[share::shares])
    if load.distribution == "constant":
        return (number / load.value for number in count(share, shares))
    return _poisson(load.value / shares, [*seed, share])


def _poisson(rate: float, seed: Sequence[int]) -> Iterator[float]:
    """Poisson arrivals, independent of each other. Several such streams together are one again."""
    random = np.random.default_rng(list(seed))
    at = 0.0
    while True:
        for gap in random.exponential(1 / rate, _DRAWN).tolist():
            at += gap
            yield at


def kind_title(kind: Kind) -> str:
    """The title of a step's load in tables and plots."""
    return {"concurrency": "in flight", "rate": "rate/s", "trace": "mean/s"}[kind]
