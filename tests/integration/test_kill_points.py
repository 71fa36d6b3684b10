"""A worker that dies at any of the places marked ``# kill point`` loses nothing, doubles nothing.

Every mark in the source is found and its worker must die there: at the end of a birth, while it
claims, decodes, computes and settles, while it recovers another, while it hands back. Then one
worker serves all that is left. Those of the room `canvas` are in test_links_of_dead_workers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
from helpers.killpoints import sitecustomize
from helpers.repository import claim_checked, fake_model, message, numbered
from helpers.results import outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis
from redis.client import PubSub

import inferq.workers
from inferq.shared.names import Names
from inferq.workers.claims.recovery import decoding_field
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
SOURCES = Path(inferq.workers.__path__[0])
#: Where the mark stands tells what its worker must be doing to get there.
RECOVERS = "recovery.py"
HANDS_BACK = ("handback-", "giveback-claim-moved")
#: Beside the first time: the n-th is another claim, or a settle.
AGAIN = {
    "exchange-unwritten": (2, 3), "exchange-written": (2, 3), "exchange-answered": (2, 3),
    "exchange-read": (2,), "settle-answered": (2,), "lane-ended": (2,),
}  # fmt: skip
#: Workers that start at a time.
WAVE = 7
SHORT_LEASE = {"INFERQ_LEASE_S": "1"}
REQUESTS = 8
#: Requests of a dead worker's claim: more than recovery moves in one trip.
MANY = 70
#: A recovery that broke off may be taken over after 10 s.
RECOVERED_WITHIN_S = 30.0


def marks() -> dict[str, Path]:
    """Every kill point in the source, and its module."""
    found: dict[str, Path] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        for _, name in sitecustomize.MARK.findall(path.read_bytes()):
            assert name.decode() not in found, f"two kill points are called {name.decode()}"
            found[name.decode()] = path
    return found


class Scene:
    """One Redis, the requests that were pushed there, and the workers that are to die."""

    def __init__(self, url: str, redis: Redis, root: Path) -> None:
        self.url = url
        self.redis = redis
        self.root = root
        self.sent: dict[str, float] = {}
        self._models = 0

    def model(self) -> str:
        """A model of its own for each worker; slow where victims see it, fast for the rescuer."""
        name = f"m{self._models}"
        self._models += 1
        knobs = "lanes = 1\nmax_batch_size = 2\nwarm_up = false"
        fake_model(self.root / "slow", name, knobs=knobs, fake="delay_ms = 60_000")
        fake_model(self.root / "brisk", name, knobs=knobs, fake="delay_ms = 30")
        fake_model(self.root / "rescue", name, knobs="lanes = 1\nwarm_up = false")
        return name

    def requests(self, model: str, count: int, priority: int) -> list[bytes]:
        """Messages of new requests, oldest first; every third is claim-checked."""
        messages = []
        for _ in range(count):
            n = float(len(self.sent))
            if len(self.sent) % 3:
                request_id, raw = message(model, numbered(n), priority=priority)
            else:
                request_id, raw, _ = claim_checked(
                    self.redis, model, numbered(n), priority=priority
                )
            self.sent[request_id] = n
            messages.append(raw)
        return messages

    def push(self, model: str, count: int) -> list[bytes]:
        """So many requests in each of two priorities."""
        pushed = []
        for priority in (0, 3):
            messages = self.requests(model, count, priority)
            self.redis.lpush(NAMES.queue(model, priority), *messages)
            pushed += messages
        return pushed

    def victim(self, place: str, model: str, models: str, **env: str) -> Worker:
        path = os.pathsep.join(
            [str(Path(sitecustomize.__file__).parent), *(each for each in sys.path if each)]
        )
        env = {**SHORT_LEASE, "PYTHONPATH": path, "INFERQ_TEST_KILL_AT": place, **env}
        name = place.replace(":", "-")
        return Worker(self.url, self.root / models, [model], name=name, env=env)


def _wave(victims: list[Worker], meanwhile: Callable[[Worker], None] = lambda _: None) -> None:
    """Start `victims`; all die where they are to."""
    with ExitStack() as stack:
        for victim in victims:
            stack.callback(victim.close)
            victim.start()
        for victim in victims:
            meanwhile(victim)
        for victim in victims:
            what = f"{victim.name} is reached"
            status = until(lambda v=victim: v.process.poll(), RECOVERED_WITHIN_S, what)  # type: ignore[misc]
            assert status == -signal.SIGKILL, f"{victim.name}: {victim.log[-3000:]}"


def _die_handing_back(scene: Scene, places: list[str]) -> None:
    """Told to stop with two claims in hand, one of them computing."""

    def stop(victim: Worker) -> None:
        victim.wait_ready()
        (model,) = victim.serve
        claims = NAMES.claims(victim.incarnation)
        for priority, held in ((3, 1), (0, 2)):
            scene.redis.lpush(NAMES.queue(model, priority), *scene.requests(model, 1, priority))
            until(lambda n=held: scene.redis.hlen(claims) == n, what=f"{held} claims")  # type: ignore[misc]
        victim.process.terminate()

    _wave([scene.victim(each, scene.model(), "slow", INFERQ_GRACE_S="0") for each in places], stop)


def _die_recovering(scene: Scene, places: list[str]) -> None:
    """As many dead workers as recoverers: each of these dies over the first that it meets."""
    redis = scene.redis
    for place in places:
        model, i = scene.model(), f"dead{place.replace('-', '')}"
        for number, (priority, count, decoded) in enumerate([(0, MANY, 1), (3, 6, 0)], start=1):
            key = NAMES.claim(i, number, model, priority)
            redis.lpush(key, *scene.requests(model, count, priority))
            redis.hset(NAMES.claims(i), key, decoded)
        redis.sadd(NAMES.running(i), f"{model}/{list(scene.sent)[-MANY]}")
        redis.set(NAMES.fence(i), 1)
        redis.zadd(NAMES.leases, {i: 1.0})
    _wave([scene.victim(place, scene.model(), "brisk") for place in places])


def _die_serving(scene: Scene, places: list[str]) -> None:
    for start in range(0, len(places), WAVE):
        victims = []
        for place in places[start : start + WAVE]:
            model = scene.model()
            pushed = scene.push(model, REQUESTS // 2)
            if place.startswith("suspect-"):
                scene.redis.hset(NAMES.attempts(model), decoding_field(pushed[0]), 1)
            victims.append(scene.victim(place, model, "brisk"))
        _wave(victims)


@pytest.fixture
def scene(new_redis: Callable[..., EmbeddedRedis], tmp_path: Path) -> Iterator[Scene]:
    server = new_redis(args=["--notify-keyspace-events", "K$"])
    with Redis.from_url(server.url, socket_timeout=10.0) as redis:
        yield Scene(server.url, redis, tmp_path)


def _stored(pubsub: PubSub) -> Counter[str]:
    """How often each result was stored since `pubsub` listens."""
    counts: Counter[str] = Counter()
    while event := pubsub.get_message(timeout=0.2):
        if event["type"] == "pmessage" and event["data"] == b"set":
            counts[event["channel"].decode().partition("celery-task-meta-")[2]] += 1
    return counts


def test_a_worker_that_dies_at_a_kill_point_loses_nothing_and_doubles_nothing(
    scene: Scene,
) -> None:
    found = {name: path for name, path in marks().items() if path.parent.name != "canvas"}
    assert set(AGAIN) <= set(found)
    redis = scene.redis
    with redis.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.psubscribe("__keyspace@0__:celery-task-meta-*")
        until(lambda: pubsub.get_message(timeout=1.0), what="it listens")
        recovering = [name for name, path in found.items() if path.name == RECOVERS]
        handing_back = [name for name in found if name.startswith(HANDS_BACK)]
        serving = [name for name in found if name not in {*recovering, *handing_back}]
        serving += [f"{name}:{n}" for name, times in AGAIN.items() for n in times]
        _die_handing_back(scene, handing_back)
        _die_recovering(scene, recovering)
        _die_serving(scene, serving)
        env = {"INFERQ_LEASE_S": "3"}  # no victim: a busy machine must not make it one
        with Worker(scene.url, scene.root / "rescue", name="rescuer", env=env) as rescuer:
            for request_id, n in scene.sent.items():
                outputs = outputs_of(redis, request_id, RECOVERED_WITHIN_S)
                np.testing.assert_array_equal(outputs["x"], numbered(n))
            with contextlib.suppress(AssertionError):
                until(lambda: not _left(redis, rescuer.serve), RECOVERED_WITHIN_S)
            assert _left(redis, rescuer.serve) == set()
            assert rescuer.alive
        counts = _stored(pubsub)
    assert counts == dict.fromkeys(scene.sent, 1)
    print(f"{len(recovering) + len(handing_back) + len(serving)} kills at {len(found)} points")


def _left(redis: Redis, models: list[str]) -> set[str]:
    """Queues, claims, payloads, counts and fences, but for what one living worker needs."""
    living = [str(i, "utf-8") for i in redis.zrange(NAMES.leases, 0, -1) if isinstance(i, bytes)]
    keys = {str(key, "utf-8") for key in redis.keys("*inferq*") if isinstance(key, bytes)}
    known = {NAMES.leases, *map(NAMES.fence, living), *map(NAMES.stats, living)}
    known |= {name for model in models for name in (NAMES.model(model), NAMES.serving(model))}
    known |= {key for key in keys if key.startswith("_kombu.")}
    return (keys - known) | set(living[1:])


def _names_in(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def test_the_modules_that_everybody_runs_hold_no_trace_of_kill_points() -> None:
    for name, path in marks().items():
        module = ".".join(("inferq", "workers", *path.relative_to(SOURCES).with_suffix("").parts))
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
        plain = spec.loader.get_code(module)
        marked = sitecustomize.Loader(module, str(path)).get_code(module)
        assert plain is not None
        assert sitecustomize.HOOK not in _names_in(plain), name
        assert _names_in(marked) == _names_in(plain) | {sitecustomize.HOOK}, name
