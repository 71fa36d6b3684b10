"""Latency at rest: one request at a time, 3 KB there and back, nothing else in the queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import interleave
from benchmarks.noop import POOLS, SMALL, small_model
from benchmarks.stage import Stage

MODEL = small_model(32)
#: Requests a round; one round of each system after the other.
COUNT = 200


def run(stage: Stage, models: Path, rounds: int, scale: float) -> dict[str, Any]:
    """p50 and p99 in ms: submit → arrays against `send_task` → `get`."""
    array = np.ones((1, SMALL), np.float32)
    client = stage.serve(models, MODEL).client
    systems: dict[str, Callable[[], object]] = {
        "inferq": lambda: client.infer(MODEL, {"x": array}, timeout=30).outputs["x"]
    }
    for pool in POOLS:
        stock = stage.plain_celery(pool).client
        systems[f"celery {pool}"] = partial(stock.one, array)
    count = max(20, int(COUNT * scale))

    def timed(request: Callable[[], object]) -> Callable[[], list[float]]:
        return lambda: [_milliseconds(request) for _ in range(count)]

    for request in systems.values():
        for _ in range(10):
            request()
    runs = interleave({name: timed(request) for name, request in systems.items()}, rounds)
    figures = {name: _percentiles(times) for name, times in runs.items()}
    report: dict[str, Any] = dict(figures)
    for percentile in ("p50", "p99"):
        best = min(figures[f"celery {pool}"][f"{percentile}_ms"] for pool in POOLS)
        report[f"{percentile}_ratio"] = figures["inferq"][f"{percentile}_ms"] / best
    return report


def _milliseconds(request: Callable[[], object]) -> float:
    before = time.perf_counter()
    request()
    return (time.perf_counter() - before) * 1e3


def _percentiles(rounds: list[list[float]]) -> dict[str, float]:
    """The median over rounds of each round's percentile: one bad second spoils one round."""
    per_round = np.percentile(np.array(rounds), [50, 99], axis=1)
    p50, p99 = np.median(per_round, axis=1)
    return {"p50_ms": float(p50), "p99_ms": float(p99)}
