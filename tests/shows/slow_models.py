"""Models whose batches take 1, 2.5 and 10 s whatever their size get batches of 32 of 32 requests.

PYTHONPATH=tests python -m shows.slow_models
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import redis as redis_py
from helpers.repository import fake_model, push
from helpers.results import expect, meta_of
from helpers.worker import SupervisedWorker

from inferq.workers.process.embedded import EmbeddedRedis

SECONDS = ("1", "2.5", "10")
REQUESTS = 32
TIMEOUT_S = 120.0


def slow_model_rows(seconds: Sequence[str] = SECONDS) -> dict[str, int]:
    """Seconds of a batch → rows of the smallest batch in which any of 32 requests ran.

    Each model has a worker of its own, all at once. The requests wait in their queues by then.
    """
    with (
        tempfile.TemporaryDirectory(prefix="inferq-show-") as name,
        EmbeddedRedis("valkey") as server,
    ):
        root = Path(name) / "models"
        for each in seconds:
            fake_model(root, _model(each), fake=f"delay_ms = {float(each) * 1000}")
        env = {"XDG_CACHE_HOME": str(Path(name) / "cache")}
        workers = [
            SupervisedWorker(server.url, root, [_model(each)], name=_model(each), env=env)
            for each in seconds
        ]
        rows: dict[str, int] = {}
        with redis_py.Redis.from_url(server.url) as client:
            sent = {each: push(client, _model(each), range(REQUESTS)) for each in seconds}
            began = time.monotonic()
            try:
                for worker in workers:
                    worker.start()
                for each, worker in zip(seconds, workers, strict=True):
                    worker.wait_ready(TIMEOUT_S)
                    print(f"{each} s a batch: serves after {time.monotonic() - began:.1f} s")
                for each in seconds:
                    expect(client, sent[each], TIMEOUT_S)
                    sizes = {
                        meta_of(client, request_id)["receipt"]["batch_size"]
                        for request_id in sent[each]
                    }
                    rows[each] = min(sizes)
                    print(f"{each} s a batch: {REQUESTS} requests in batches of {rows[each]}")
            finally:
                for worker in workers:
                    worker.close()
    return rows


def _model(seconds: str) -> str:
    return f"takes-{seconds.replace('.', '-')}-s"


if __name__ == "__main__":
    slow_model_rows()
