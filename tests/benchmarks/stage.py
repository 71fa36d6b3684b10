"""The stage all benchmarks share: one Redis of our own and worker processes on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from helpers.worker import Worker

from benchmarks.harness import Sample, measure
from benchmarks.processes import LEAN, stock_worker
from benchmarks.stock import SIZE_VARIABLE, URL_VARIABLE, StockClient
from inferq.producer import Client
from inferq.shared.names import META_PREFIX
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

Work = Callable[[Array, int], None]


@dataclass(frozen=True)
class Served:
    """A worker process and a client of it."""

    pid: int
    client: Client


@dataclass(frozen=True)
class StockServed:
    """A stock worker process and a client of it."""

    pid: int
    client: StockClient


class Stage:
    """One Redis; workers started on it live until the stage closes."""

    def __init__(self, url: str, redis_pid: int, opened: ExitStack) -> None:
        self.url = url
        self._redis_pid = redis_pid
        self._opened = opened
        self._redis = redis.Redis.from_url(url, socket_timeout=30)

    def serve(self, models: Path, model: str) -> Served:
        """Start an inferq worker of one model of the repository `models`; wait until it serves."""
        worker = Worker(self.url, models, [model], name=f"bench-{model}", args=LEAN)
        pid = self._opened.enter_context(worker).pid
        return Served(pid, self._opened.enter_context(Client(self.url)))

    def plain_celery(self, pool: str) -> StockServed:
        """Start plain Celery on the pool `solo` or `prefork`."""
        return self._stock(f"celery-{pool}", "plain_celery", pool, {})

    def celery_batches(self, size: int) -> StockServed:
        """Start celery-batches with batches of `size`."""
        env = {SIZE_VARIABLE: str(size)}
        return self._stock(f"batches-{size}", "celery_batches_app", "solo", env)

    def _stock(self, queue: str, module: str, pool: str, env: dict[str, str]) -> StockServed:
        env = {URL_VARIABLE: self.url, **env}
        worker = stock_worker(f"benchmarks.{module}", queue, pool, env)
        pid = self._opened.enter_context(worker)
        client = StockClient(self.url, queue)
        self._opened.callback(client.close)
        return StockServed(pid, client)

    def measure(self, work: Work, array: Array, count: int, worker: int) -> Sample:
        """One run of `count` requests, with the results that it left behind deleted after it."""
        sample = measure(lambda: work(array, count), count, worker, self._redis_pid)
        self._drop_results()
        return sample

    def _drop_results(self) -> None:
        block: list[bytes] = []
        for key in self._redis.scan_iter(META_PREFIX + "*", count=1000):
            block.append(key)
            if len(block) == 1000:
                self._redis.unlink(*block)
                block.clear()
        if block:
            self._redis.unlink(*block)

    @property
    def redis_version(self) -> str:
        """Name and version of the server, as it says them."""
        info = self._redis.info("server")
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version']}"
        return f"Redis {info['redis_version']}"


@contextmanager
def open_stage() -> Iterator[Stage]:
    """A stage on a fresh embedded server; everything on it is stopped at the end."""
    with EmbeddedRedis() as server, ExitStack() as opened:
        yield Stage(server.url, server.pid, opened)
