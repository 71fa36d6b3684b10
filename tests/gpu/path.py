"""The whole way: producers → Redis → a worker on the card → results."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from helpers.worker import SupervisedWorker, Worker

from gpu.checks import Expected
from gpu.lanes import make_batch
from inferq.producer import Client
from inferq.shared.schema import Tensors
from inferq.workers.models.spec import ModelSpec
from inferq.workers.process.embedded import EmbeddedRedis

IN_FLIGHT: Final = 256
#: Answers of each producer that are looked at.
CHECKED: Final = 256
RECOVERED_WITHIN_S: Final = 120.0
#: What the supervisor logs of a child whose engine was beyond use.
_ENDED: Final = "with status 70"


class Flow(msgspec.Struct, frozen=True):
    """What the producers got, all of them together."""

    producers: int
    rows_per_s: float
    batch: float
    gpu_compute_ms: float


def _produce(
    url: str, model: str, seconds: float, expected: Expected, seed: int, found: Any
) -> None:
    try:
        found.put(_produced(url, model, seconds, expected, seed))
    except BaseException as problem:
        found.put(repr(problem))
        raise


def _produced(
    url: str, model: str, seconds: float, expected: Expected, seed: int
) -> tuple[float, int, float, float]:
    order = expected.order(CHECKED, seed)
    rows, batches, compute = 0, 0.0, 0.0
    with Client(url) as client:
        client.infer(model, dict(expected.rows[order[0]]), timeout=60)
        ends = time.monotonic() + seconds

        def inputs() -> Iterator[Tensors]:
            n = 0
            while time.monotonic() < ends:
                yield dict(expected.rows[order[n % len(order)]])
                n += 1

        began = time.monotonic()
        for result in client.map(model, inputs(), in_flight=IN_FLIGHT):
            if rows < CHECKED:
                right = {name: a[[order[rows]]] for name, a in expected.answers.items()}
                expected.check(result.outputs, right)
            rows += 1
            assert result.receipt is not None
            batches += 1 / result.receipt.batch_size
            compute += (result.receipt.gpu_compute_ms or 0.0) / result.receipt.batch_size
        took = time.monotonic() - began
    return rows / took, rows, batches, compute


def whole_path(
    root: Path,
    spec: ModelSpec,
    producers: int,
    seconds: float,
    env: Mapping[str, str],
    expected: Expected,
) -> Flow:
    """Several producers, each a process with `IN_FLIGHT` requests in flight, for `seconds`.

    Each looks at its first `CHECKED` answers. RuntimeError: what went wrong in one of them.
    """
    spawn = multiprocessing.get_context("spawn")
    with EmbeddedRedis() as redis, Worker(redis.url, root, [spec.name], env=env):
        found = spawn.Queue()
        started = [
            spawn.Process(
                target=_produce, args=(redis.url, spec.name, seconds, expected, seed, found)
            )
            for seed in range(producers)
        ]
        for process in started:
            process.start()
        got = [found.get(timeout=seconds + 120) for _ in started]
        for process in started:
            process.join(60)
    for each in got:
        if isinstance(each, str):
            raise RuntimeError(f"a producer: {each}")
    rate = sum(each[0] for each in got)
    rows, batches, compute = (sum(each[n] for each in got) for n in (1, 2, 3))
    return Flow(producers, rate, rows / batches, compute / batches)


def recovery(root: Path, spec: ModelSpec, env: Mapping[str, str]) -> tuple[float, int]:
    """Seconds in which nothing was served after a sticky error, and requests that failed.

    The worker's child gets its error from the folder `poisoned` on its path. TimeoutError: it never
    had one, or nothing was served after it.
    """
    before = {**os.environ, **env}.get("PYTHONPATH")
    paths = [str(Path(__file__).with_name("poisoned")), before]
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "INFERQ_POISON_AFTER_S": "3"}
    parts, failed = make_batch(spec, 1).parts[0], 0
    with (
        EmbeddedRedis() as redis,
        SupervisedWorker(redis.url, root, [spec.name], env=env) as worker,
        Client(redis.url) as client,
    ):
        last, longest, ends = time.monotonic(), 0.0, time.monotonic() + RECOVERED_WITHIN_S
        while time.monotonic() < ends:
            ended = _ENDED in worker.log
            try:
                client.infer(spec.name, parts, timeout=60)
            except Exception:  # noqa: BLE001 - counted
                failed += 1
                continue
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            if ended:
                return longest, failed
        told = "nothing was served after it" if _ENDED in worker.log else "no process ended"
        raise TimeoutError(
            f"{told} within {RECOVERED_WITHIN_S:g} s; expected a child that ends {_ENDED} and a "
            f"successor that serves; {failed} requests failed"
        )
