"""Lanes that run at once for a while: how many batches, in which time, by how much CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from gpu.together import Turns, together
from inferq.shared.schema import Array
from inferq.workers.models.engine import Batch, Lane

#: Eager twice, then captured, then as a graph.
WARM: Final = 3


@dataclass(frozen=True)
class Rate:
    """Of all lanes together."""

    batches: int
    wall_s: float
    cpu_s: float


def measure(
    lanes: Sequence[Lane],
    work: Sequence[Batch],
    seconds: float,
    look: Callable[[Batch, Mapping[str, Array]], None] | None = None,
) -> Rate:
    """Each lane runs its own batch of `work`, over and over; `look` sees what each run answers.

    What a lane raises is raised. They are warmed up one after the other, each in its thread.
    """
    counts = [0] * len(lanes)
    began: list[tuple[float, float]] = []
    ended: list[tuple[float, float]] = []

    def drive(turns: Turns, n: int) -> None:
        def warm() -> None:
            for _ in range(WARM):
                lanes[n].run(work[n])

        turns.one_by_one(warm)
        start = time.monotonic(), time.process_time()
        began.append(start)
        while turns.on and time.monotonic() - start[0] < seconds:
            outputs = lanes[n].run(work[n])
            counts[n] += 1
            if look is not None:
                look(work[n], outputs)
        ended.append((time.monotonic(), time.process_time()))

    together([partial(drive, n=n) for n in range(len(lanes))], seconds)
    (first, cpu_first), (last, cpu_last) = min(began), max(ended)
    return Rate(sum(counts), last - first, cpu_last - cpu_first)
