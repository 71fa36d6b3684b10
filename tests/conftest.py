"""Fixtures that every test may use: a real Redis, in each kind that this machine has."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import redis as redis_py
from helpers import fakecuda
from helpers.acl import Users
from hypothesis import HealthCheck, settings
from kombu import pools

from inferq.shared.errors import ConfigError
from inferq.workers.process.embedded import EmbeddedRedis, find_server

# The tests' own use of onnxruntime reports nothing either; the worker sets this itself.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A busy machine makes an example slow, never wrong.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

#: valkey always; redis-server where there is one.
KINDS = ["valkey", *(["redis-server"] if shutil.which("redis-server") else [])]


@pytest.fixture(scope="session", autouse=True)
def cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Names of folders that are not there, one after the other.

    The first is the cache of what is not of one test alone.
    """
    root = tmp_path_factory.mktemp("cache")
    folders = (root / str(number) for number in count())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(next(folders)))
        yield folders


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, cache_folders: Iterator[Path]) -> None:
    """No setting of the developer's own shell reaches a test, nor what another test has cached."""
    for name in list(os.environ):
        if name.startswith(("INFERQ_", "CELERY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(next(cache_folders)))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")  # nor is anything kept in the developer's own


@pytest.fixture(scope="session", params=KINDS)
def redis_kind(request: pytest.FixtureRequest) -> str:
    """The kind of Redis that the test runs on; skips where it is missing, but fails on CI."""
    kind = str(request.param)
    try:
        find_server(kind)
    except ConfigError as problem:
        if os.environ.get("CI") == "true":
            pytest.fail(str(problem))
        pytest.skip(str(problem))
    return kind


@pytest.fixture(scope="session")
def redis_server(redis_kind: str) -> Iterator[EmbeddedRedis]:
    """A server that tests share. Never kill or configure it: see `new_redis`."""
    with EmbeddedRedis(redis_kind) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The URL of an empty database."""
    with redis_py.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_py.Redis]:
    """A client of that empty database; replies are bytes."""
    with redis_py.Redis.from_url(redis_url, socket_timeout=10.0) as client:
        yield client


@pytest.fixture
def users(redis_url: str) -> Iterator[Users]:
    """Redis users of the test's own: a producer that may only push, and those of users.acl."""
    with Users(redis_url) as users:
        yield users


@pytest.fixture
def push_only(users: Users) -> redis_py.Redis:
    """A client that may LPUSH to the queues of models, and do nothing else."""
    return users.push_only()


@pytest.fixture
def kills_connections() -> Iterator[None]:
    """For a test that kills all connections of the server that tests share.

    Afterwards kombu's pools, which belong to the process, hold none that is dead.
    """
    yield
    pools.reset()


@pytest.fixture
def new_redis(redis_kind: str) -> Iterator[Callable[..., EmbeddedRedis]]:
    """``new_redis(**options)`` starts a server of the test's own: to kill, fill or configure."""
    servers: list[EmbeddedRedis] = []

    def start(**options: object) -> EmbeddedRedis:
        server = EmbeddedRedis(redis_kind, **options)  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake ``libcuda.so.1`` (see `helpers.fakecuda`), with PyCUDA there to use it."""
    reason = fakecuda.why_not()
    if reason is None and importlib.util.find_spec("pycuda") is None:
        reason = "PyCUDA is not installed: make .venv/.gpu-ready"
    if reason is not None:
        pytest.skip(reason)
    return fakecuda.build_driver(tmp_path_factory.mktemp("fakecuda"))
