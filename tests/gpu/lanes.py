"""Lanes of one model on the card: right? as fast as the engine itself? growing?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
import numpy as np

from gpu.checks import Expected
from gpu.together import Turns, together
from inferq.shared.schema import Array
from inferq.workers.cuda import device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.models.engine import Batch, LoadedModel
from inferq.workers.models.registry import engine_class
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.flavours import Flavour

#: Eager, captured, as a graph.
RUNS: Final = 3
#: Memory that may come and go; a batch that leaves something behind leaves it 10,000 times.
MAX_GROWTH_MB: Final = 64.0
GROWN_WITHIN_S: Final = 1800.0


@dataclass(frozen=True)
class Setup:
    """One way to run a model. `flavour`: None: on torch."""

    flavour: Flavour | None
    precision: str
    lanes: int
    graphs: bool

    def __str__(self) -> str:
        kind = "graphs" if self.graphs else "eager"
        return f"{self.precision} {self.lanes} lanes {kind}"


class Speed(msgspec.Struct, frozen=True):
    """Of one bucket. `share`: the lanes' throughput by that of the engine back to back."""

    bucket: int
    rows_per_s: float
    alone_rows_per_s: float
    share: float
    #: Of the time that copies took, what did not lengthen the whole.
    hidden: float
    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class Growth(msgspec.Struct, frozen=True):
    """Between the first tenth and the end of so many batches."""

    batches: int
    gpu_mb: float
    host_mb: float


def open_session(spec: ModelSpec, setup: Setup) -> LoadedModel:
    """To be closed. For torch, `spec` is that of the .pt2 file."""
    name, table = "torch", {"device": "cuda", "cuda_graphs": setup.graphs}
    if setup.flavour is not None:
        name = "tensorrt"
        table = {
            "flavour": setup.flavour.name,
            "precision": setup.precision,
            "cuda_graphs": setup.graphs,
        }
    config = spec.config.model_copy(update={"lanes": setup.lanes})
    return engine_class(name)(replace(spec, config=config, engine_table=table)).load()


def make_batch(spec: ModelSpec, rows: int, seed: int = 0) -> Batch:
    """`rows` requests of one row each."""
    rng = np.random.default_rng(seed)
    parts: list[dict[str, Array]] = []
    for _ in range(rows):
        part: dict[str, Array] = {}
        for tensor in spec.signature.inputs:
            shape = (1, *(int(dim or 1) for dim in tensor.shape[1:]))
            if np.dtype(tensor.dtype).kind == "f":
                part[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
            else:
                part[tensor.name] = rng.integers(0, 256, shape).astype(tensor.dtype)
        parts.append(part)
    return Batch(parts, rows, rows)


def largest_error(spec: ModelSpec, session: LoadedModel, expected: Expected) -> float:
    """Against ONNX Runtime, of every lane at every bucket, with and without padding.

    WrongAnswers: it is above the precision's limit, or the check itself could not tell.
    """
    worst = 0.0
    for lane in session.lanes:
        for bucket in spec.config.buckets:
            for rows in sorted({bucket, max(1, bucket - 1)}):
                for turn in range(RUNS):
                    batch, right = expected.batch(rows, bucket, seed=rows + turn)
                    worst = max(worst, expected.check(lane.run(batch), right))
    return worst


def speed(spec: ModelSpec, lanes: Sequence[CudaLane], bucket: int, seconds: float) -> Speed:
    """Median of three: all lanes at once for `seconds`, and the first one's engine alone.

    What a lane raises is raised: what the others did without it is no share of anything.
    """
    batch = make_batch(spec, bucket)
    lanes[0].run(batch)
    found: list[Speed] = []
    for _ in range(3):
        alone_ms = lanes[0].repeat(batch, max(3, int(seconds * 1000 / _once_ms(lanes[0], batch))))
        counts, copies, spans = [0] * len(lanes), [0.0] * len(lanes), list[tuple[float, float]]()

        def drive(
            turns: Turns,
            n: int,
            counts: list[int] = counts,
            copies: list[float] = copies,
            spans: list[tuple[float, float]] = spans,
        ) -> None:
            turns.one_by_one(lambda: _warm(lanes[n], batch))
            began = time.monotonic()
            while turns.on and time.monotonic() - began < seconds:
                lanes[n].run(batch)
                times = lanes[n].gpu_times
                assert times is not None
                counts[n] += 1
                copies[n] += times.h2d_ms + times.d2h_ms
            spans.append((began, time.monotonic()))

        together([partial(drive, n=n) for n in range(len(lanes))], seconds)
        wall_ms = (max(end for _, end in spans) - min(began for began, _ in spans)) * 1000
        rate, alone = sum(counts) * bucket / wall_ms * 1000, bucket / alone_ms * 1000
        shown = max(0.0, wall_ms - sum(counts) * alone_ms)
        times = lanes[0].gpu_times
        assert times is not None
        found.append(
            Speed(
                bucket,
                rate,
                alone,
                rate / alone,
                max(0.0, 1 - shown / sum(copies)) if sum(copies) else 1.0,
                times.h2d_ms,
                times.compute_ms,
                times.d2h_ms,
            )
        )
    middle = median(each.share for each in found)
    return next(each for each in found if each.share == middle)


def _warm(lane: CudaLane, batch: Batch) -> None:
    """In the thread that is measured: libraries keep some of what they prepare by thread."""
    for _ in range(RUNS):
        lane.run(batch)


def _warm_all(lane: CudaLane, work: Sequence[Batch]) -> None:
    for batch in work:
        _warm(lane, batch)


def _once_ms(lane: CudaLane, batch: Batch) -> float:
    return max(1e-3, lane.repeat(batch, 3))


def growth(spec: ModelSpec, lanes: Sequence[CudaLane], batches: int) -> Growth:
    """Memory after a tenth of `batches`, by all lanes and of all buckets, and after all."""
    work = [make_batch(spec, bucket) for bucket in spec.config.buckets]
    gpu = device.acquire()

    def drive(turns: Turns, lane: CudaLane, count: int) -> None:
        turns.one_by_one(lambda: _warm_all(lane, work))
        for n in range(count):
            if not turns.on:
                return
            lane.run(work[n % len(work)])

    def run(count: int) -> tuple[int, int]:
        share = count // len(lanes)
        together([partial(drive, lane=lane, count=share) for lane in lanes], GROWN_WITHIN_S)
        return gpu.memory()[0], _rss()

    try:
        free, rss = run(batches // 10)
        free_after, rss_after = run(batches - batches // 10)
    finally:
        device.release()
    return Growth(batches, (free - free_after) / 1e6, (rss_after - rss) / 1e6)


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
