"""Lanes of one model on the card: right? as fast as the engine itself? growing?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from inferq.shared.schema import Array
from inferq.workers.cuda import device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.models.engine import Batch, Lane, LoadedModel
from inferq.workers.models.registry import engine_class
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.verify import LIMITS, verify


@dataclass(frozen=True)
class Setup:
    """One way to run a model. `flavour`: None: on torch."""

    flavour: Flavour | None
    precision: str
    lanes: int
    graphs: bool


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


def largest_error(spec: ModelSpec, session: LoadedModel, setup: Setup) -> float:
    """Against ONNX Runtime, of every lane at every bucket, with and without padding.

    ConfigError: it is above the precision's limit.
    """
    worst = 0.0
    for lane in session.lanes:
        for bucket in spec.config.buckets:
            for rows in {bucket, max(1, bucket - 1)}:
                batch = make_batch(spec, rows, seed=rows)
                inputs = {
                    name: np.concatenate([part[name] for part in batch.parts])
                    for name in batch.parts[0]
                }
                padded = Batch(batch.parts, rows, bucket)
                for _ in range(3):  # eager, then as a graph

                    def run(_: object, lane: Lane = lane, padded: Batch = padded):  # type: ignore[no-untyped-def]
                        return lane.run(padded)

                    error = verify(
                        run,
                        spec,
                        [inputs],
                        precision=setup.precision,
                        limit=LIMITS[setup.precision],
                    )
                    worst = max(worst, error)
    return worst


def speed(spec: ModelSpec, lanes: Sequence[CudaLane], bucket: int, seconds: float) -> Speed:
    """Median of three: all lanes at once for `seconds`, and the first one's engine alone."""
    batch = make_batch(spec, bucket)
    for lane in [*lanes, *lanes]:
        lane.run(batch)
    found: list[Speed] = []
    for _ in range(3):
        alone_ms = lanes[0].repeat(batch, max(3, int(seconds * 1000 / _once_ms(lanes[0], batch))))
        counts, copies, began = [0] * len(lanes), [0.0] * len(lanes), time.monotonic()

        def drive(
            n: int, counts: list[int] = counts, copies: list[float] = copies, t: float = began
        ) -> None:
            while time.monotonic() - t < seconds:
                lanes[n].run(batch)
                times = lanes[n].gpu_times
                assert times is not None
                counts[n] += 1
                copies[n] += times.h2d_ms + times.d2h_ms

        threads = [threading.Thread(target=drive, args=(n,)) for n in range(len(lanes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall_ms = (time.monotonic() - began) * 1000
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


def _once_ms(lane: CudaLane, batch: Batch) -> float:
    return max(1e-3, lane.repeat(batch, 3))


def growth(spec: ModelSpec, lanes: Sequence[CudaLane], batches: int) -> Growth:
    """Memory after a tenth of `batches`, by all lanes and of all buckets, and after all."""
    work = [make_batch(spec, bucket) for bucket in spec.config.buckets]
    gpu = device.acquire()

    def drive(lane: CudaLane, count: int) -> None:
        for n in range(count):
            lane.run(work[n % len(work)])

    def run(count: int) -> tuple[int, int]:
        threads = [
            threading.Thread(target=drive, args=(lane, count // len(lanes))) for lane in lanes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return gpu.memory()[0], _rss()

    try:
        free, rss = run(batches // 10)
        free_after, rss_after = run(batches - batches // 10)
    finally:
        device.release()
    return Growth(batches, (free - free_after) / 1e6, (rss_after - rss) / 1e6)


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
