"""Warm-up measures every bucket: the batch size that serves most rows a second is aimed at.

Bigger is not always better: on two CPU cores magika is fastest at batch 1 or 2, full batches of 32
give 0.69 of that. All lanes run at once while this measures, as they do under load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from inferq.shared.schema import Array, Signature
from inferq.workers.batching.padding import PadRule
from inferq.workers.engines.base import Batch, Lane
from inferq.workers.ranges import Usual

#: Seconds spent on one measurement of one size, at least one run in any case.
PER_SIZE_S: Final = 0.1
#: Seconds after which no larger size is tried.
BUDGET_S: Final = 5.0
#: Seconds that one batch costs beside its run: the CPU of handing it to a lane and its outcomes
#: back. It speaks for a larger batch where the engine itself hardly does. What it costs to claim
#: and settle is shared by the batches formed ahead.
PER_BATCH_S: Final = 0.1e-3
#: A smaller batch is preferred to the fastest one if it reaches this share of it: it waits less.
GOOD_ENOUGH: Final = 0.985
#: Two sizes in a row below this share of the fastest end the search for larger ones.
FALLING: Final = 0.9
#: How many of the fastest are measured again, and how often: what else runs on the machine can
#: only make a size look slow, so the best of its measurements counts.
AGAIN, ROUNDS = 3, 2


@dataclass(frozen=True)
class Tuning:
    """What was measured. `rows_per_s` maps each tried size to all lanes' rows per second."""

    rows_per_s: dict[int, float]

    @property
    def best(self) -> int:
        """The smallest size that serves as many rows as the best, cost per batch included."""
        served = {n: n / (n / rate + PER_BATCH_S) for n, rate in self.rows_per_s.items()}
        top = max(served.values())
        return min(size for size, rate in served.items() if rate >= GOOD_ENOUGH * top)

    @property
    def seconds_per_row(self) -> float:
        return 1 / self.rows_per_s[self.best]


def sizes(max_batch_size: int, buckets: Sequence[int]) -> list[int]:
    """The sizes to try: the buckets, or the powers of two, up to and with `max_batch_size`."""
    if buckets:
        return [*(size for size in buckets if size < max_batch_size), max_batch_size]
    powers = [2**n for n in range(max_batch_size.bit_length()) if 2**n < max_batch_size]
    return [*powers, max_batch_size]


def sample(
    signature: Signature,
    rows: int,
    pads: Mapping[str, PadRule],
    usual: Mapping[str, int] | None = None,
    *,
    batchable: bool = True,
) -> dict[str, Array] | None:
    """Zeros that fit `signature`; None if nothing says how large a dim is.

    `usual`: symbol → size; it wins over the largest bucket of `pads`.
    """
    batch, known = signature.batch_symbol if batchable else None, usual or {}
    arrays: dict[str, Array] = {}
    for spec in signature.inputs:
        shape: list[int] = []
        for dim in spec.shape:
            if isinstance(dim, int):
                shape.append(dim)
            elif dim is None:
                return None
            elif dim == batch:
                shape.append(rows)
            elif dim in known:
                shape.append(known[dim])
            elif dim in pads:
                shape.append(pads[dim].buckets[-1])
            else:
                return None
        arrays[spec.name] = np.zeros(shape, spec.dtype)
    return arrays


def measure(
    lanes: Sequence[Lane],
    signature: Signature,
    tried: Sequence[int],
    pads: Mapping[str, PadRule],
    buckets: Sequence[int] = (),
    usual: Sequence[Usual] = (),
    *,
    batchable: bool = True,
) -> Tuning | None:
    """Run each size in `tried`, measure the promising ones. None: no sample input can be made.

    Each is padded to its bucket, as it will be. With several `usual` inputs the first are measured;
    of the others each lane runs what they allow. Whatever an engine raises here is raised: a model
    that cannot run zeros is not served.
    """

    def made(size: int, of: Usual) -> Batch | None:
        arrays = sample(signature, size, pads, of.sizes, batchable=batchable)
        if arrays is None:
            return None
        bucket = next((bucket for bucket in buckets if bucket >= size), size)
        return Batch([arrays], size, bucket, batchable and signature.batch_symbol is not None)

    first, *others = usual or [Usual({}, tried[-1])]
    batches: dict[int, Batch] = {}
    rates: dict[int, float] = {}
    began = time.monotonic()
    falling = 0
    for size in tried:
        batch = made(size, first)
        if batch is None:
            return None
        batches[size] = batch
        lanes[0].run(batch)
        if rates and (falling == 2 or time.monotonic() - began > BUDGET_S):
            continue
        rates[size] = _rate(lanes, batches[size])
        falling = falling + 1 if rates[size] < FALLING * max(rates.values()) else 0
    if len(rates) > 1:
        fastest = sorted(rates, key=lambda size: -rates[size])[:AGAIN]
        for size in fastest * ROUNDS:
            rates[size] = max(rates[size], _rate(lanes, batches[size]))
    for other in others:
        allowed = [made(size, other) for size in tried if size <= other.rows]
        for lane in lanes:
            for batch in filter(None, allowed):
                lane.run(batch)
    return Tuning(rates)


def _rate(lanes: Sequence[Lane], batch: Batch) -> float:
    counts = [0] * len(lanes)
    problems: list[BaseException] = []
    start = time.monotonic()

    def drive(index: int) -> None:
        try:
            while not counts[index] or time.monotonic() - start < PER_SIZE_S:
                lanes[index].run(batch)
                counts[index] += 1
        except Exception as problem:  # noqa: BLE001 - raised below, in the caller's thread
            problems.append(problem)

    threads = [threading.Thread(target=drive, args=(i,), daemon=True) for i in range(len(lanes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return sum(counts) * batch.rows / (time.monotonic() - start)
