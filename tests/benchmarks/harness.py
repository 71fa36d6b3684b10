"""Measure requests/s and CPU µs a request, side by side, in rounds that interleave all systems.

A shared machine drifts; so every round runs every system once, in a new order, and what is
reported is the median over rounds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

T = TypeVar("T")

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """One run. `cpu_us` is CPU µs a request of the producer, worker and Redis processes."""

    rps: float
    producer_us: float
    worker_us: float
    redis_us: float

    @property
    def cpu_us(self) -> dict[str, float]:
        return {
            "producer": self.producer_us,
            "worker": self.worker_us,
            "redis": self.redis_us,
            "total": self.producer_us + self.worker_us + self.redis_us,
        }


def process_tree(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    pids = [pid]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            pids += process_tree(int(child))
    return pids


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time that the processes have used so far."""
    total = 0.0
    for pid in pids:
        # The command, in parentheses, may hold spaces; utime and stime are fields 14 and 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total


def measure(work: Callable[[], None], count: int, worker: int, redis: int) -> Sample:
    """Time `work`, which serves `count` requests from this process.

    `worker` and `redis` are the process ids of the others; the worker's children count too.
    """
    worker_tree, redis_tree = process_tree(worker), [redis]
    worker_before, redis_before = cpu_seconds(worker_tree), cpu_seconds(redis_tree)
    cpu_before, before = time.process_time(), time.perf_counter()
    work()
    wall, producer = time.perf_counter() - before, time.process_time() - cpu_before
    worker_used = cpu_seconds(worker_tree) - worker_before
    redis_used = cpu_seconds(redis_tree) - redis_before
    each = 1e6 / count
    return Sample(count / wall, producer * each, worker_used * each, redis_used * each)


def medians(samples: Sequence[Sample]) -> Sample:
    """The median of every figure on its own."""
    return Sample(
        rps=median(s.rps for s in samples),
        producer_us=median(s.producer_us for s in samples),
        worker_us=median(s.worker_us for s in samples),
        redis_us=median(s.redis_us for s in samples),
    )


def interleave(systems: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run every system once a round, in an order that changes; what each run returned."""
    results: dict[str, list[T]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name in random.sample(list(systems), len(systems)):
            results[name].append(systems[name]())
    return results
