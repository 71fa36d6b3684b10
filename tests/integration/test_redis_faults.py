"""Redis restarts, goes away and comes back; connections die in silence; clocks are wrong."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from functools import partial
from pathlib import Path

import helpers.wrong_clock
import numpy as np
import pytest
from chaos.proxy import Proxy
from helpers.process import held_open
from helpers.repository import fake_model, numbered, push
from helpers.results import expect, meta_of, nothing_is_held
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import AsyncClient, Client
from inferq.shared.errors import DeadlineExceeded
from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.supervision.health import read_beat

NAMES = Names()
SERVER = {"appendonly": True, "args": ("--appendfsync", "always")}
#: The promises.
CONSUMES_WITHIN_S = 5.0
NOTICED_WITHIN_S = 15.0
KNOBS = "lanes = 1\nmax_batch_size = 4\nwarm_up = false"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs=KNOBS, fake="delay_ms = 20")
    fake_model(root, "slow", knobs=KNOBS, fake="delay_ms = 1500")
    return root


def test_it_consumes_again_after_20_restarts_of_20(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """Every other time with work in flight. Nothing piles up."""
    with Worker(server.url, models, ["m"]) as worker:
        until(lambda: "test@" in worker.log and " ready." in worker.log, what="all of it is up")
        open_before = held_open(worker.pid)
        for n in range(20):
            sent = push(redis, "m", range(30)) if n % 2 else {}
            if sent:  # on a busy machine all may have been computed before this looks
                until(
                    lambda: redis.keys(NAMES.running("*")) or not redis.llen(NAMES.queue("m")),
                    what="some compute",
                )
            server.kill()
            server.start()
            back = time.monotonic()
            sent |= push(redis, "m", range(1))
            expect(redis, sent)
            assert time.monotonic() - back <= CONSUMES_WITHIN_S, f"restart {n}"
        assert worker.alive
        until(partial(_no_more_than, worker.pid, open_before), 30, "nothing has piled up")
        assert worker.stop() == 0


def _no_more_than(pid: int, before: tuple[int, int]) -> bool:
    threads, sockets = held_open(pid)
    return threads <= before[0] and sockets <= before[1]


def test_results_that_were_ready_during_an_outage_are_settled_after_it(
    server: EmbeddedRedis, redis: Redis, models: Path, tmp_path: Path
) -> None:
    """Once, by the incarnation that computed them."""
    path = tmp_path / "beat.json"
    with Worker(server.url, models, ["slow"], env={"INFERQ_HEARTBEAT_FILE": str(path)}) as worker:
        sent = push(redis, "slow", range(3))
        until(lambda: redis.keys(NAMES.running("*")), what="they compute")
        server.kill()

        def computed() -> bool:
            beat = read_beat(path)
            return beat is not None and beat.state == "serving" and not beat.computing

        until(lambda: (b := read_beat(path)) is not None and b.computing, what="it is told")
        until(computed, what="their batch has ended")
        server.start()
        expect(redis, sent)
        for request_id in sent:
            assert meta_of(redis, request_id)["receipt"]["attempt"] == 1
        assert redis.exists(NAMES.fence(worker.incarnation))
        assert "recovered" not in worker.log


def test_an_outage_longer_than_the_lease_costs_nobody_a_claim(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """Three leases long; both workers hold requests meanwhile."""
    env = {"INFERQ_LEASE_S": "1"}
    with (
        Worker(server.url, models, ["slow"], name="a", env=env) as a,
        Worker(server.url, models, ["slow"], name="b", env=env) as b,
    ):
        sent = push(redis, "slow", range(24))
        until(lambda: len(redis.keys(NAMES.running("*"))) == 2, what="both compute")
        ends = [redis.zscore(NAMES.leases, each.incarnation) or 0.0 for each in (a, b)]
        server.kill()
        wall_ms = partial(lambda: time.time() * 1000)
        until(lambda: wall_ms() > max(ends) + 2000, what="both leases are long over")
        server.start()
        expect(redis, sent, 60)
        for request_id in sent:
            assert meta_of(redis, request_id)["receipt"]["attempt"] == 1
        for each in (a, b):
            assert "recovered" not in each.log
            assert redis.exists(NAMES.fence(each.incarnation))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_half_open_connection_is_noticed(
    server: EmbeddedRedis, redis: Redis, models: Path, busy: bool
) -> None:
    """All of a worker's connections end in a black hole; new ones work."""
    with (
        Proxy(server.port, ["worker"]) as proxy,
        Worker(proxy.url("worker"), models, ["m"]) as worker,
    ):
        sent = push(redis, "m", range(40 if busy else 0))
        if busy:
            until(lambda: redis.keys(NAMES.running("*")), what="some compute")
        proxy.swallow(["worker"])
        since = time.monotonic()
        sent |= push(redis, "m", range(1))
        expect(redis, sent, 30)
        assert time.monotonic() - since <= NOTICED_WITHIN_S
        until(partial(nothing_is_held, redis), what="nothing is held any more")
        assert worker.alive


def test_a_clients_half_open_connection_is_noticed(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with (
        Proxy(server.port, ["client"]) as proxy,
        Worker(server.url, models, ["slow"]),
        Client(proxy.url("client")) as client,
    ):
        pending = client.submit("slow", {"x": numbered(3)})
        proxy.swallow(["client"])
        since = time.monotonic()
        np.testing.assert_array_equal(pending.result(30).outputs["x"], numbered(3))
        assert time.monotonic() - since <= NOTICED_WITHIN_S


def test_an_async_clients_half_open_connection_is_noticed(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    async def infer(url: str, proxy: Proxy) -> float:
        async with AsyncClient(url) as client:
            pending = await client.submit("slow", {"x": numbered(3)})
            proxy.swallow(["client"])
            since = time.monotonic()
            np.testing.assert_array_equal((await pending.result(30)).outputs["x"], numbered(3))
            return time.monotonic() - since

    with Proxy(server.port, ["client"]) as proxy, Worker(server.url, models, ["slow"]):
        assert asyncio.run(infer(proxy.url("client"), proxy)) <= NOTICED_WITHIN_S


@pytest.mark.parametrize("off_s", [-7200, 7200], ids=["two hours slow", "two hours fast"])
def test_a_wrong_wall_clock_changes_nothing(
    server: EmbeddedRedis, redis: Redis, models: Path, off_s: int
) -> None:
    """Leases, deadlines and receipts go by Redis' clock; a right worker serves beside it."""
    hook = str(Path(helpers.wrong_clock.__path__[0]))
    path = os.pathsep.join([hook, *(entry for entry in sys.path if entry)])
    wrong = {"PYTHONPATH": path, "INFERQ_TEST_CLOCK_S": str(off_s), "INFERQ_LEASE_S": "1"}
    with (
        Worker(server.url, models, ["slow"], name="wrong", env=wrong) as worker,
        Worker(server.url, models, ["m"], name="right", env={"INFERQ_LEASE_S": "1"}) as other,
        Client(server.url) as client,
    ):
        first = client.submit("slow", {"x": numbered(1)}, timeout_ms=60_000)
        until(lambda: redis.keys(NAMES.running(worker.incarnation)), what="it computes")
        late = client.submit("slow", {"x": numbered(2)}, timeout_ms=500)
        receipt = first.result(15).receipt
        assert receipt is not None
        assert receipt.attempt == 1
        assert receipt.queue_ms is not None
        assert receipt.queue_ms < 5_000
        with pytest.raises(DeadlineExceeded):
            late.result(15)
        for each in (worker, other):
            assert "lease of" not in each.log
            assert "recovered" not in each.log
