"""Large requests fill neither a worker's memory nor the way of small ones.

What a worker holds is seen in Redis: its claims, whose settled places are blank.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from helpers.repository import claim_checked, fake_model, push
from helpers.results import nothing_is_held
from helpers.wait import until
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared.names import Names
from inferq.workers.data_plane.budget import budget_bytes

SERVER: dict[str, object] = {}
NAMES = Names()
MB = 1024 * 1024
KNOBS = "lanes = 2\nmax_batch_size = 32\nwarm_up = false"
#: A worker without requests, and what is in use beside the requests that it holds: a batch that is
#: put together, results that are written out, memory that is kept.
IDLE_BYTES = 200 * MB
BESIDE = 1.5

OPEN = """\
engine = "fake"
lanes = 2
max_batch_size = 32
warm_up = false
[fake]
inputs = [{ name = "x", dtype = "float32", shape = ["batch", "n"] }]
delay_ms = 1.0
"""


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def large(redis: redis_py.Redis, model: str, nbytes: int, count: int) -> list[str]:
    """Queue so many requests of `nbytes`, all at once; their ids."""
    ids, raws = [], []
    for n in range(count):
        request_id, raw, _ = claim_checked(redis, model, np.full((1, nbytes // 4), n, np.float32))
        ids.append(request_id)
        raws.append(raw)
    redis.lpush(NAMES.queue(model), *raws)
    return ids


def done(redis: redis_py.Redis, ids: list[str]) -> int:
    return int(redis.exists(*[NAMES.meta(each) for each in ids]))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "large", knobs=KNOBS, fake="delay_ms = 50", width=4 * MB)
    fake_model(root, "small", knobs=KNOBS, fake="delay_ms = 1")
    (root / "open").mkdir()
    (root / "open" / "model.toml").write_text(OPEN)
    return root


def test_requests_of_16_mb_are_claimed_by_their_bytes_and_not_by_their_number(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    ids = large(redis, "large", 16 * MB, 40)
    with Worker(redis_url, models, ["large"]) as worker:
        most = 0
        while (stored := done(redis, ids)) < len(ids):
            # Read first what is settled: so it is rather too much than too little.
            most = max(most, len(ids) - redis.llen(NAMES.queue("large")) - stored)
            assert worker.alive
        assert most >= 2, "they were not claimed one by one"
        assert most * 16 * MB <= budget_bytes()
        assert peak_bytes(worker.pid) <= IDLE_BYTES + BESIDE * budget_bytes()
        until(lambda: nothing_is_held(redis), what="nothing is held any more")


def test_large_requests_behind_thousands_of_small_ones_are_fetched_as_there_is_room(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    with Worker(redis_url, models, ["open"]) as worker:
        push(redis, "open", range(3_000))
        until(lambda: nothing_is_held(redis), what="small ones are answered")
        # By now the worker takes it that requests are small.
        ids = large(redis, "open", 16 * MB, 40)
        until(lambda: done(redis, ids) == len(ids), 60, "all are answered")
        assert peak_bytes(worker.pid) <= IDLE_BYTES + BESIDE * budget_bytes()
        until(lambda: nothing_is_held(redis), what="nothing is held any more")


def test_small_requests_of_one_model_pass_by_large_ones_of_another(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    ids = large(redis, "large", 16 * MB, 40)
    with Worker(redis_url, models, ["large", "small"]), Client(redis_url) as client:
        until(lambda: done(redis, ids) > 0, what="large ones are computed")
        inputs = [{"x": np.full((1, 4), n, np.float32)} for n in range(500)]
        got = list(client.map("small", inputs, timeout=30))
        assert len(got) == 500
        assert done(redis, ids) < len(ids), "and large ones went on"
        until(lambda: done(redis, ids) == len(ids), 60, "all are answered")
