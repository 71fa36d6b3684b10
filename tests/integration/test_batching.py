"""What the batching knobs promise, as seen in the receipts of a real worker's requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.repository import fake_model, numbered
from helpers.results import held_by, nothing_is_held
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client, Pending
from inferq.shared.names import Names
from inferq.shared.schema import Array, Receipt
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
#: ms of one batch: long enough for what is submitted meanwhile to be claimed.
DELAY_MS = 250
#: An audit would keep a lane for as long as a batch.
ONE = "lanes = 1\nwarm_up = false\naudit_every = 0\n"
KNOBS = {
    "plain": ONE + "max_batch_size = 8",
    "buckets": ONE + "max_batch_size = 8\nbuckets = [1, 4, 8]",
    "preferred": ONE + "max_batch_size = 8\npreferred_batch_sizes = [2, 4]",
    "two_lanes": "lanes = 2\nwarm_up = false\naudit_every = 0\nmax_batch_size = 8",
    "delay": ONE + "max_batch_size = 4\nmax_queue_delay_ms = 400",
    "single": ONE + "max_batch_size = 1",
}


@pytest.fixture(scope="module")
def server(redis_kind: str) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(redis_kind) as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker that serves a model for each set of knobs, and one with an open inner dim."""
    root: Path = tmp_path_factory.mktemp("models")
    for name, knobs in KNOBS.items():
        fake_model(root, name, knobs=knobs, fake=f"delay_ms = {DELAY_MS}")
    (root / "open").mkdir()
    (root / "open" / "model.toml").write_text(
        f'engine = "fake"\n{ONE}max_batch_size = 16\n[fake]\ndelay_ms = {DELAY_MS}\n'
        'inputs = [{ name = "x", dtype = "float32", shape = ["batch", "n"] }]\n'
    )
    (root / "padded").mkdir()
    (root / "padded" / "model.toml").write_text(
        f'engine = "fake"\n{ONE}max_batch_size = 16\n[pad.n]\nbuckets = [4, 8]\n'
        f"[fake]\ndelay_ms = {DELAY_MS}\n"
        'inputs = [{ name = "x", dtype = "float32", shape = ["batch", "n"] }]\n'
    )
    with Worker(server.url, root) as worker:
        yield worker


@pytest.fixture
def redis(server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def client(server: EmbeddedRedis, worker: Worker, redis: Redis) -> Iterator[Client]:
    until(lambda: nothing_is_held(redis), what="the lanes are free")
    with Client(server.url) as client:
        yield client


def busy(client: Client, redis: Redis, model: str, lanes: int = 1) -> list[Pending]:
    """Requests that now occupy the model's lanes, so that what follows has to wait."""
    running = [NAMES.running(i.decode()) for i in redis.zrange(NAMES.serving(model), 0, -1)]  # type: ignore[union-attr]
    first: list[Pending] = []
    for n in range(lanes):
        first.append(client.submit(model, {"x": numbered(-100 - n)}))
        until(lambda: redis.scard(running[0]) > n, what=f"{n + 1} lanes are busy")  # noqa: B023
    return first


def rows(value: float, count: int = 1, width: int = 4) -> Array:
    return np.full((count, width), value, np.float32)


def receipts(pending: Sequence[Pending]) -> list[Receipt]:
    found = [each.result(30).receipt for each in pending]
    return [receipt for receipt in found if receipt is not None]


def test_what_waited_leaves_together_and_each_gets_its_own_rows(
    client: Client, redis: Redis
) -> None:
    first = busy(client, redis, "plain")
    items = [rows(n, 1 + n % 2) for n in range(5)]
    pending = [client.submit("plain", {"x": item}) for item in items]
    for item, each in zip(items, pending, strict=True):
        np.testing.assert_array_equal(each.result(30).outputs["x"], item)
    assert [(r.requests, r.batch_size, r.padding) for r in receipts(pending)] == [(5, 7, 0)] * 5
    (alone,) = receipts(first)
    assert (alone.requests, alone.batch_size) == (1, 1)


def test_a_receipt_says_where_the_time_went(client: Client, redis: Redis) -> None:
    first = busy(client, redis, "plain")
    pending = client.submit("plain", {"x": rows(1)})
    for each, waited in ((first[0], False), (pending, True)):
        result = each.result(30)
        receipt = result.receipt
        assert receipt is not None
        assert receipt.queue_ms is not None
        assert receipt.compute_ms >= DELAY_MS
        assert (receipt.queue_ms + receipt.form_ms > DELAY_MS / 4) == waited
        parts = receipt.queue_ms + receipt.form_ms + receipt.compute_ms + receipt.settle_ms
        # Each side knows Redis' clock to within a round trip, which a busy machine makes long.
        assert parts <= result.latency_ms + 50
        assert (receipt.model, receipt.engine, receipt.version, receipt.attempt) == (
            "plain",
            "fake",
            1,
            1,
        )


def test_no_batch_exceeds_max_batch_size_and_no_request_is_split(
    client: Client, redis: Redis
) -> None:
    first = busy(client, redis, "plain")
    pending = [client.submit("plain", {"x": rows(n, 3)}) for n in range(6)]
    for n, each in enumerate(pending):
        np.testing.assert_array_equal(each.result(30).outputs["x"], rows(n, 3))
    assert {(r.requests, r.batch_size) for r in receipts(pending)} == {(2, 6)}
    receipts(first)


def test_a_batch_is_padded_to_its_bucket_and_the_padding_is_cut_off(
    client: Client, redis: Redis
) -> None:
    first = busy(client, redis, "buckets")
    pending = [client.submit("buckets", {"x": rows(n, 2)}) for n in range(3)]
    for n, each in enumerate(pending):
        np.testing.assert_array_equal(each.result(30).outputs["x"], rows(n, 2))
    assert {(r.requests, r.batch_size, r.padding) for r in receipts(pending)} == {(3, 6, 2)}
    assert receipts(first)[0].padding == 0


def test_the_largest_preferred_size_is_aimed_at(client: Client, redis: Redis) -> None:
    first = busy(client, redis, "preferred")
    pending = [client.submit("preferred", {"x": rows(n)}) for n in range(4)]
    large = client.submit("preferred", {"x": rows(9, 8)})
    assert {r.batch_size for r in receipts(pending)} == {4}
    assert [(r.requests, r.batch_size) for r in receipts([large])] == [(1, 8)]
    receipts(first)


def test_two_lanes_compute_at_the_same_time(client: Client, redis: Redis) -> None:
    first = busy(client, redis, "two_lanes", lanes=2)
    one, two = receipts(first)
    assert one.form_ms < DELAY_MS / 2
    assert two.form_ms < DELAY_MS / 2


def test_a_batch_waits_for_company_as_long_as_it_was_told_and_no_longer(client: Client) -> None:
    alone = receipts([client.submit("delay", {"x": rows(0)})])
    assert 390 <= alone[0].form_ms < 400 + DELAY_MS / 2
    pending = [client.submit("delay", {"x": rows(n)}) for n in range(4)]
    full = receipts(pending)
    assert {r.requests for r in full} == {4}
    assert all(r.form_ms < 200 for r in full), "a full batch does not wait"


def test_a_model_of_batch_size_one_runs_request_by_request(client: Client, redis: Redis) -> None:
    first = busy(client, redis, "single")
    pending = [client.submit("single", {"x": rows(n)}) for n in range(2)]
    assert {(r.requests, r.batch_size) for r in receipts([*first, *pending])} == {(1, 1)}


def test_different_inner_sizes_never_share_a_batch(client: Client, redis: Redis) -> None:
    first = [client.submit("open", {"x": rows(0, 1, 9)})]
    until(lambda: not nothing_is_held(redis), what="its lane is busy")
    items = [rows(n, 1, 2 + n % 3) for n in range(12)]
    pending = [client.submit("open", {"x": item}) for item in items]
    for item, each in zip(items, pending, strict=True):
        np.testing.assert_array_equal(each.result(30).outputs["x"], item)
    assert {(r.requests, r.batch_size) for r in receipts(pending)} == {(4, 4)}
    receipts(first)


def test_padded_sizes_share_a_batch_and_each_gets_its_own_size_back(
    client: Client, redis: Redis
) -> None:
    first = [client.submit("padded", {"x": rows(0, 1, 1)})]
    until(lambda: not nothing_is_held(redis), what="its lane is busy")
    items = [rows(n, 1, 1 + n) for n in range(8)]
    pending = [client.submit("padded", {"x": item}) for item in items]
    for item, each in zip(items, pending, strict=True):
        np.testing.assert_array_equal(each.result(30).outputs["x"], item)
    assert [r.requests for r in receipts(pending)] == [4] * 8
    receipts(first)


def test_urgent_requests_leave_first_whenever_they_came(client: Client, redis: Redis) -> None:
    first = busy(client, redis, "single")
    later = [client.submit("single", {"x": rows(n)}, priority=p) for n, p in enumerate((9, 9, 3))]
    (incarnation,) = redis.zrange(NAMES.serving("single"), 0, -1)
    assert isinstance(incarnation, bytes)
    until(lambda: held_by(redis, incarnation.decode()) >= 2, what="some are claimed")
    urgent = client.submit("single", {"x": rows(9)}, priority=0)
    order = sorted([*later, urgent], key=lambda each: each.result(30).latency_ms)
    assert order.index(urgent) == 0
    assert order.index(later[2]) == 1
    receipts(first)


def test_models_of_one_worker_do_not_wait_for_each_other(client: Client, redis: Redis) -> None:
    first = busy(client, redis, "plain")
    other = receipts([client.submit("buckets", {"x": rows(1)})])[0]
    assert other.form_ms < DELAY_MS / 2
    receipts(first)
