"""Audits find a model that mixes rows, and cost next to nothing.

``PYTHONPATH=tests python -m shows.audit`` prints the figures.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from benchmarks.ceiling import example_rows
from benchmarks.processes import LEAN
from helpers import onnx_models
from helpers.crowd import ask
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.names import Names
from inferq.workers.audit.audit import Mismatch
from inferq.workers.demo.models import MAGIKA, prepare
from inferq.workers.metrics.published import read_stats
from inferq.workers.process.embedded import EmbeddedRedis

#: Requests among which a model that mixes rows is to be found.
REQUESTS: Final = 1_000
ROUNDS: Final = 7
BATCH: Final = 32
#: Runs of each side in one round, which take turns: what else the machine does hits both alike.
TURNS: Final = 12
#: Requests of one run: a fraction of a second.
NOOP_COUNT: Final = 1_000
MAGIKA_COUNT: Final = 32
NOOP: Final = """\
engine = "fake"
[fake]
inputs = [{ name = "x", dtype = "float32", shape = ["batch", 768] }]
"""
#: The same model, with audits as they are by default, and without.
KNOBS: Final = {
    "on": f"max_batch_size = {BATCH}\npreferred_batch_sizes = [{BATCH}]\n",
    "off": f"max_batch_size = {BATCH}\npreferred_batch_sizes = [{BATCH}]\naudit_every = 0\n",
}


def audit_found_after() -> int:
    """How many requests of 16 clients a worker has answered when it finds a model that mixes rows.

    It is declared ``batchable = true``: y = x and 5 % of the batch's mean. AssertionError: not
    among `REQUESTS`.
    """
    with tempfile.TemporaryDirectory(prefix="inferq-show-") as folder, EmbeddedRedis() as server:
        onnx_models.company(Path(folder) / "company" / "1" / "model.onnx")
        (Path(folder) / "company" / "model.toml").write_text("batchable = true")
        with Worker(server.url, Path(folder)), Redis.from_url(server.url) as client:
            ask(server.url, "company", REQUESTS)

            def found() -> Mismatch | None:
                told = [model for stats in read_stats(client, Names()) for model in stats.models]
                return told[0].mismatch if told else None

            mismatch = until(found, what="the worker tells what it found")
            assert mismatch is not None
            return mismatch.requests


def audit_cpu_ratio(rounds: int = ROUNDS) -> float:
    """A worker's CPU time a request with audits, over that without: no-ops in batches of 32.

    A machine that does something else shows this to within 1 % or so; `audit_cpu_share` is exact.
    """
    with tempfile.TemporaryDirectory(prefix="inferq-show-") as folder:
        items = _write_noops(Path(folder))
        with _served(Path(folder)) as (worker, client):
            return _ratio(worker, client, items, NOOP_COUNT, rounds)


def audit_cpu_share(requests: int = 50_000) -> float:
    """Time that audits take of no-ops in batches of 32, by the worker's count, over its CPU time.

    An audit computes all the while, so it takes no more CPU than that.
    """
    with tempfile.TemporaryDirectory(prefix="inferq-show-") as folder:
        items = _write_noops(Path(folder))
        with _served(Path(folder)) as (worker, client), Redis.from_url(worker.redis_url) as redis:
            before = _cpu_s(worker.pid)
            for _ in client.map("on", islice(cycle(items), requests), in_flight=8 * BATCH):
                pass
            used = _cpu_s(worker.pid) - before

            def counted() -> list[float]:
                told = [model for stats in read_stats(redis, Names()) for model in stats.models]
                return [m.audit_s for m in told if m.model == "on" and m.answered >= requests]

            (took,) = until(counted, what="the worker has counted all")
            return took / used


def _write_noops(root: Path) -> list[dict[str, Any]]:
    """Both models; what is asked of them."""
    for name, knobs in KNOBS.items():
        (root / name).mkdir()
        (root / name / "model.toml").write_text(knobs + NOOP)
    return [{"x": np.ones((1, 768), np.float32)}]


def audit_cpu_ratio_of_magika(rounds: int = ROUNDS) -> float:
    """The same of a real model."""
    with tempfile.TemporaryDirectory(prefix="inferq-show-") as folder:
        for name, knobs in KNOBS.items():
            prepare(Path(folder) / f".{name}")
            (Path(folder) / f".{name}" / MAGIKA).rename(Path(folder) / name)
            (Path(folder) / name / "model.toml").write_text(knobs)
        rows = example_rows(Path(folder) / "on" / "1" / "model.onnx", 64)
        items = [{name: array[n : n + 1] for name, array in rows.items()} for n in range(64)]
        with _served(Path(folder)) as (worker, client):
            return _ratio(worker, client, items, MAGIKA_COUNT, rounds)


@contextmanager
def _served(models: Path) -> Iterator[tuple[Worker, Client]]:
    """One worker process of both: what is compared differs in nothing else."""
    with (
        EmbeddedRedis() as server,
        Worker(server.url, models, list(KNOBS), args=LEAN) as worker,
        Client(server.url) as client,
    ):
        yield worker, client


def _ratio(
    worker: Worker, client: Client, items: list[dict[str, Any]], count: int, rounds: int
) -> float:
    """The median over rounds, of the median of a round's turns."""

    def cpu_s(model: str, requests: int) -> float:
        before = _cpu_s(worker.pid)
        for _ in client.map(model, islice(cycle(items), requests), in_flight=8 * BATCH):
            pass
        return _cpu_s(worker.pid) - before

    ratios = []
    for model in KNOBS:
        cpu_s(model, count)
    for _ in range(rounds):
        turns = []
        for _ in range(TURNS):
            used = {model: cpu_s(model, count) for model in random.sample(list(KNOBS), len(KNOBS))}
            turns.append(used["on"] / used["off"])
        ratios.append(median(turns))
    return median(ratios)


def _cpu_s(pid: int) -> float:
    """User and system time of a process, to the nanosecond: Linux' clock of another process."""
    return time.clock_gettime((~pid << 3) | 2)


if __name__ == "__main__":
    print("audit_found_after", audit_found_after())
    print("audit_cpu_ratio", audit_cpu_ratio())
    print("audit_cpu_share", audit_cpu_share())
    print("audit_cpu_ratio_of_magika", audit_cpu_ratio_of_magika())
