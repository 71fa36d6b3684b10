"""The whole way: producers → Redis → a worker on the card → results."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from helpers.worker import SupervisedWorker, Worker

from gpu.lanes import make_batch
from inferq.producer import Client
from inferq.shared.schema import Tensors
from inferq.workers.models.repository import load_model
from inferq.workers.models.spec import ModelSpec
from inferq.workers.process.embedded import EmbeddedRedis

IN_FLIGHT = 256


class Flow(msgspec.Struct, frozen=True):
    """What the producers got, all of them together."""

    producers: int
    rows_per_s: float
    batch: float
    gpu_compute_ms: float


def _produce(url: str, root: Path, model: str, seconds: float, found: object) -> None:
    spec = load_model(root, model, on_cpu=True)
    parts = make_batch(spec, 64).parts
    rows, batches, compute = 0, 0.0, 0.0
    with Client(url) as client:
        client.infer(model, parts[0], timeout=60)
        ends = time.monotonic() + seconds

        def inputs() -> Iterator[Tensors]:
            n = 0
            while time.monotonic() < ends:
                yield parts[n % len(parts)]
                n += 1

        began = time.monotonic()
        for result in client.map(model, inputs(), in_flight=IN_FLIGHT):
            rows += 1
            assert result.receipt is not None
            batches += 1 / result.receipt.batch_size
            compute += (result.receipt.gpu_compute_ms or 0.0) / result.receipt.batch_size
        took = time.monotonic() - began
    found.put((rows / took, rows, batches, compute))  # type: ignore[attr-defined]


def whole_path(
    root: Path, spec: ModelSpec, producers: int, seconds: float, env: Mapping[str, str]
) -> Flow:
    """Several producers, each a process with `IN_FLIGHT` requests in flight, for `seconds`."""
    spawn = multiprocessing.get_context("spawn")
    with EmbeddedRedis() as redis, Worker(redis.url, root, [spec.name], env=env):
        found = spawn.Queue()
        started = [
            spawn.Process(target=_produce, args=(redis.url, root, spec.name, seconds, found))
            for _ in range(producers)
        ]
        for process in started:
            process.start()
        got = [found.get(timeout=seconds + 120) for _ in started]
        for process in started:
            process.join(60)
    rate = sum(each[0] for each in got)
    rows, batches, compute = (sum(each[n] for each in got) for n in (1, 2, 3))
    return Flow(producers, rate, rows / batches, compute / batches)


def recovery(root: Path, spec: ModelSpec, env: Mapping[str, str]) -> tuple[float, int]:
    """Seconds in which nothing was served after a sticky error, and requests that failed.

    The worker's child gets its error from the folder `poisoned` on its path.
    """
    paths = [str(Path(__file__).with_name("poisoned")), env.get("PYTHONPATH", "")]
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "INFERQ_POISON_AFTER_S": "3"}
    parts, failed = make_batch(spec, 1).parts[0], 0
    with (
        EmbeddedRedis() as redis,
        SupervisedWorker(redis.url, root, [spec.name], env=env) as worker,
        Client(redis.url) as client,
    ):
        last, longest, ends = time.monotonic(), 0.0, time.monotonic() + 60
        while time.monotonic() < ends:
            try:
                client.infer(spec.name, parts, timeout=60)
            except Exception:  # noqa: BLE001 - counted
                failed += 1
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            if "with status 70" in worker.log and longest > 0.2:
                break
    return longest, failed
