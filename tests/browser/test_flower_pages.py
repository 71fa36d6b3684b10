"""What an operator sees in Flower is true: in a real browser, of a real worker under load."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import redis as redis_py
from helpers.flower import FlowerProcess
from helpers.load import Load
from helpers.repository import fake_model, message, numbered
from helpers.visitor import PATIENCE_MS, Visitor
from helpers.wait import until
from helpers.worker import Worker
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, expect

from inferq.shared.names import Names
from inferq.workers.data_plane.counts import WorkerStats
from inferq.workers.models.not_served import NotServed
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
PHONE = 360
LONG_NAME = "m" + "ost-distinguished_model" * 4 + ".v2"

Keep = Callable[[Page, str], None]


@pytest.fixture(scope="module")
def server(redis_kind: str) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(redis_kind) as server:
        yield server


@pytest.fixture(scope="module")
def flower(server: EmbeddedRedis) -> Iterator[FlowerProcess]:
    with FlowerProcess(server.url) as flower:
        yield flower


@pytest.fixture
def store(server: EmbeddedRedis) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def busy(server: EmbeddedRedis, store: redis_py.Redis, tmp_path: Path) -> Iterator[Load]:
    """A worker with as much to do as it can."""
    fake_model(tmp_path, "busy", knobs="max_batch_size = 32")
    with Worker(server.url, tmp_path, name="busy"), Load(server.url, "busy") as load:
        yield load


def enqueue(store: redis_py.Redis, model: str, priorities: list[int]) -> None:
    for priority in priorities:
        _, raw = message(model, numbered(1), priority=priority)
        store.lpush(NAMES.queue(model, priority), raw)


def waiting(store: redis_py.Redis, model: str) -> int:
    """What LLEN says, all priorities together."""
    return sum(int(str(store.llen(NAMES.queue(model, p)))) for p in NAMES.priority_steps)


def cell(page: Page, model: str, field: str) -> Locator:
    return page.locator(f'tr[data-queue="inferq.{model}"] [data-field="{field}"]')


def figure(page: Page, model: str, field: str) -> Locator:
    return page.locator(f'[data-model="{model}"] [data-field="{field}"]')


def shows(locator: Locator, text: str | re.Pattern[str]) -> None:
    expect(locator).to_have_text(text, timeout=PATIENCE_MS)


def reads(page: Page, model: str, field: str, wanted: Callable[[], str]) -> None:
    """Load the Broker page again until it says what is `wanted` then."""

    def once() -> bool:
        page.reload()
        found = cell(page, model, field)
        return bool(found.count()) and found.inner_text() == wanted()

    until(once, 30.0, f"{model}: {field} is right")


def test_the_broker_page_shows_what_llen_says_with_and_without_a_worker(
    flower: FlowerProcess,
    server: EmbeddedRedis,
    store: redis_py.Redis,
    visitor: Visitor,
    tmp_path: Path,
    keep: Keep,
) -> None:
    enqueue(store, "slow", [0, 0, 0, 3, 6, 9, 9])
    page = visitor.open(f"{flower.url}/broker")
    reads(page, "slow", "waiting", lambda: str(waiting(store, "slow")))
    assert cell(page, "slow", "waiting").inner_text() == "7"
    assert cell(page, "slow", "by-priority").inner_text() == "0: 3, 3: 1, 6: 1, 9: 2"
    assert cell(page, "slow", "consumers").inner_text() == "0"
    row = page.locator('tr[data-queue="inferq.slow"]')
    expect(row).to_contain_text("no worker consumes it")
    keep(page, "broker-without-a-worker")

    knobs = "lanes = 1\nmax_batch_size = 1\nwarm_up = false"
    fake_model(tmp_path, "slow", knobs=knobs, fake="delay_ms = 60000")
    with Worker(server.url, tmp_path, args=["--without-heartbeat"]) as worker:
        until(lambda: waiting(store, "slow") < 7, 30.0)
        reads(page, "slow", "consumers", lambda: "1")
        reads(page, "slow", "waiting", lambda: str(waiting(store, "slow")))
        reads(page, "slow", "claimed", lambda: str(7 - waiting(store, "slow")))
        enqueue(store, "slow", [9] * 5)
        reads(page, "slow", "claimed", lambda: str(12 - waiting(store, "slow")))
        reads(page, "slow", "waiting", lambda: str(waiting(store, "slow")))
        assert int(cell(page, "slow", "waiting").inner_text()) >= 5
        keep(page, "broker-with-a-worker")
        worker.kill()
    assert not visitor.complaints


def test_workers_stay_online_under_load_and_say_what_they_serve(
    flower: FlowerProcess, busy: Load, visitor: Visitor, keep: Keep
) -> None:
    page = visitor.open(f"{flower.url}/workers")
    row = page.locator("#workers-table tbody tr", has_text="busy@")
    expect(row).to_contain_text("Online", timeout=PATIENCE_MS)

    def heartbeats() -> list[float]:
        data = flower.get("/workers?json=1").json()["data"]
        (worker,) = [each for each in data if each["hostname"].startswith("busy@")]
        assert worker["status"] is True
        return list(worker["heartbeats"])

    began, last = busy.done, heartbeats()[-1]
    until(lambda: heartbeats()[-1] > last + 4.0, 30.0, "heartbeats go on")
    assert busy.done > began
    expect(row).to_contain_text("Online")
    keep(page, "workers")
    row.get_by_role("link", name="Worker busy@").click()
    page.get_by_role("tab", name="Other").click()
    other = page.locator("#tab-other")
    for line in ("busy:1", "serving"):
        expect(other).to_contain_text(line)
    keep(page, "worker")
    assert not visitor.complaints


def test_the_page_inference_is_live(
    flower: FlowerProcess, busy: Load, visitor: Visitor, keep: Keep
) -> None:
    page = visitor.open(f"{flower.url}/workers")
    page.get_by_role("link", name="Inference").click()
    shows(figure(page, "busy", "rate"), re.compile(r"^[1-9][\d,.]*$"))
    shows(figure(page, "busy", "p50"), re.compile(r"^[\d.,]+ (µs|ms|s)$"))
    shows(figure(page, "busy", "p95"), re.compile(r"^[\d.,]+ (µs|ms|s)$"))
    shows(figure(page, "busy", "consumers"), "1")
    shows(figure(page, "busy", "dead"), "0")
    expect(page.locator('[data-model="busy"] .inference-bar').first).to_be_visible()
    expect(page.locator('[data-model="busy"] [data-part="infer"]')).to_be_visible()
    worker = page.locator('[data-worker^="busy@"]')
    shows(worker.locator('[data-field="state"]'), "serving")
    shows(worker.locator('[data-field="models"]'), "busy:1")
    shows(page.locator("#inference-status"), "Live, every 2 s")
    expect(page.locator("#inference-problem")).to_be_hidden()

    began, before = time.monotonic(), busy.done

    def page_agrees() -> bool:
        """What it says is about what the client counts."""
        models = flower.get("/inference/data").json()["models"]
        (row,) = [each for each in models if each["model"] == "busy"]
        elapsed = time.monotonic() - began
        per_s = (busy.done - before) / elapsed
        return elapsed > 3 and 0.5 < row["rates"]["requests_per_s"] / max(1.0, per_s) < 2

    until(page_agrees, 60.0)
    keep(page, "inference")
    page.emulate_media(color_scheme="dark")
    keep(page, "inference-dark")
    assert not visitor.complaints
    assert {
        url.partition("/static/")[0].partition("/inference")[0].partition("/workers")[0]
        for url in visitor.asked
    } == {flower.url}


def test_on_a_phone_nothing_scrolls_sideways(
    flower: FlowerProcess, busy: Load, store: redis_py.Redis, visitor: Visitor, keep: Keep
) -> None:
    enqueue(store, LONG_NAME, [0, 3, 6, 9])
    store.lpush(NAMES.dead(LONG_NAME), b"letter")
    page = visitor.open(f"{flower.url}/inference", width=PHONE)
    shows(figure(page, LONG_NAME, "depth"), re.compile("^4"))
    shows(figure(page, "busy", "p95"), re.compile(r"\d"))
    expect(page.locator('[data-model="busy"] .inference-bar').first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    too_wide = """() => [...document.querySelectorAll("#inference *")].filter(
        each => each.getBoundingClientRect().right > innerWidth + 0.5).length"""
    assert page.evaluate(too_wide) == 0
    keep(page, "inference-phone")
    page.get_by_role("button", name="Toggle navigation").click()
    expect(page.get_by_role("link", name="Inference")).to_be_visible()
    page.goto(f"{flower.url}/broker")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    keep(page, "broker-phone")


def test_what_redis_says_is_text_and_never_markup(
    flower: FlowerProcess, store: redis_py.Redis, visitor: Visitor
) -> None:
    attack = "<img src=x onerror='window.attacked=1'><script>window.attacked=1</script>"
    stats = WorkerStats(
        incarnation="evil",
        node=attack,
        host=attack,
        pid=1,
        started_at=0.0,
        at=1.0,
        state=attack,
        redis_up=True,
        device=attack,
        versions={attack: attack},
        models=[],
        not_served=[NotServed(attack, attack)],
        passed_over=[attack],
        gpu={"memory_used_bytes": 3.5 * 2**30, "memory_total_bytes": 24 * 2**30, "index": 0},
    )
    raw = msgspec.to_builtins(stats)
    histogram = {"counts": [1], "sum": 1.0}
    raw["models"] = [{
        "model": attack, "version": 1, "engine": attack, "lanes": 1, "max_batch_size": 1,
        "target_batch_size": 1, "outcomes": {attack: 1}, "errors": {attack: 1}, "attempts": 0,
        "batches": 0, "rows": 0, "padding_rows": 0, "busy_s": 0.0, "unbatched": True,
        "mismatch": {"what": attack, "rows": 1, "requests": 1},
        **dict.fromkeys(
            ("batch_size", "padding", "queue_s", "compute_input_s", "compute_infer_s",
             "compute_output_s", "settle_s", "total_s"), histogram,
        ),
    }]  # fmt: skip
    store.zadd(NAMES.leases, {"evil": 9e15})
    store.set(NAMES.stats("evil"), msgspec.msgpack.encode(raw), ex=600)
    store.lpush(f"inferq.{attack}", "x")
    page = visitor.open(f"{flower.url}/inference")
    shows(page.locator("[data-worker] .inference-name"), attack)
    shows(page.locator("[data-model] .inference-name", has_text="<img"), attack)
    shows(page.locator("[data-missing] .inference-name"), attack)
    shows(page.locator("[data-missing] .inference-reason"), attack)
    shows(page.locator('[data-field="gpu-memory"]'), "3.5 of 24 GiB")
    shows(page.locator('[data-alert="mismatch"]'), "runs request by request")
    assert page.locator("#inference img, #inference script").count() == 0
    assert page.evaluate("window.attacked") is None
    page.goto(f"{flower.url}/broker")
    assert page.evaluate("window.attacked") is None
    assert not visitor.complaints


def test_without_a_model_the_page_says_what_to_do(
    flower: FlowerProcess, store: redis_py.Redis, visitor: Visitor, keep: Keep
) -> None:
    page = visitor.open(f"{flower.url}/inference")
    empty = page.locator("#inference-models")
    expect(empty).to_contain_text("inferq worker --models DIR", timeout=PATIENCE_MS)
    shows(page.locator('[data-total="depth"]'), "0")
    keep(page, "inference-empty")
    enqueue(store, "alone", [0, 9])
    shows(figure(page, "alone", "depth"), re.compile(r"^2\D"))
    expect(page.locator('[data-model="alone"]')).to_contain_text("no worker serves it")


def test_nobody_looking_nothing_is_asked(
    flower: FlowerProcess, store: redis_py.Redis, visitor: Visitor
) -> None:
    page = visitor.open(flower.url, wait=False)
    page.clock.install()
    page.goto(f"{flower.url}/inference")

    def asked() -> int:
        return sum(url.endswith("/inference/data") for url in visitor.asked)

    def turn(hidden: bool) -> None:
        page.evaluate(
            """hidden => {
                Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    shows(page.locator("#inference-status"), "Live, every 2 s")
    with page.expect_response("**/inference/data"):
        page.clock.run_for(2100)
    turn(hidden=True)
    before = asked()
    page.clock.run_for(600_000)
    assert asked() == before
    with page.expect_response("**/inference/data"):
        turn(hidden=False)


def test_the_page_says_that_redis_is_away_and_how_old_its_figures_are(
    new_redis: Callable[..., EmbeddedRedis], visitor: Visitor, keep: Keep
) -> None:
    server = new_redis(appendonly=True)
    with FlowerProcess(server.url) as flower, redis_py.Redis.from_url(server.url) as store:
        enqueue(store, "m", [0, 3])
        page = visitor.open(f"{flower.url}/inference")
        shows(figure(page, "m", "depth"), re.compile(r"^2\D"))
        server.kill()
        problem = page.locator("#inference-problem")
        expect(problem).to_contain_text("What stands here was read", timeout=PATIENCE_MS)
        expect(problem).to_contain_text("Redis")
        shows(page.locator("#inference-status"), re.compile("^Figures of .* ago$"))
        shows(figure(page, "m", "depth"), re.compile(r"^2\D"))
        keep(page, "inference-redis-away")
        server.start()
        shows(page.locator("#inference-status"), "Live, every 2 s")
        expect(problem).to_be_hidden()


def test_flower_gone_is_said_on_the_page(
    server: EmbeddedRedis, store: redis_py.Redis, visitor: Visitor
) -> None:
    enqueue(store, "m", [0])
    with FlowerProcess(server.url) as flower:
        page = visitor.open(f"{flower.url}/inference")
        shows(figure(page, "m", "depth"), "1")
    expect(page.locator("#inference-problem")).to_contain_text(
        "Flower does not answer. What stands here was read", timeout=PATIENCE_MS
    )


def is_refused(page: Page, url: str) -> bool:
    """Whether the browser is told 401 there; it may not even show that."""
    try:
        reply = page.goto(url)
    except PlaywrightError as problem:
        return "INVALID_AUTH_CREDENTIALS" in problem.message
    return reply is not None and reply.status == 401


def test_strangers_are_refused_and_who_has_the_password_sees_the_page(
    server: EmbeddedRedis, store: redis_py.Redis, visitor: Visitor
) -> None:
    enqueue(store, "m", [0])
    env = {"INFERQ_FLOWER_BASIC_AUTH": "ops:s3cret"}
    with FlowerProcess(server.url, env=env, address="0.0.0.0", prefix="/ops") as flower:
        for credentials in (None, "ops:wrong"):
            stranger = visitor.open(flower.url, wait=False, credentials=credentials)
            for path in ("/inference", "/inference/data", "/broker", "/workers", "/metrics"):
                assert is_refused(stranger, f"{flower.url}{path}")
        page = visitor.open(f"{flower.url}/inference", credentials="ops:s3cret")
        shows(figure(page, "m", "depth"), "1")
