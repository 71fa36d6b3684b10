"""No wait on a socket to Redis is without an end, whoever opens it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py
from helpers.stock import let_go
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel

from inferq.shared import connect
from inferq.shared.celery_app import make_app
from inferq.shared.connect import (
    CONNECT_TIMEOUT_S,
    KEEPALIVE_OPTIONS,
    SOCKET_TIMEOUT_S,
    async_redis_client,
    redis_client,
    socket_limits,
)
from inferq.shared.settings import Settings
from inferq.workers.canvas.celery_canvas import await_no_results

SENTINEL = "sentinel://h1:26379/0;sentinel://h2:26379/0"
TLS = "rediss://h:1/0?ssl_cert_reqs=required"


def bounded(kwargs: dict[str, Any], *, over_network: bool) -> bool:
    """Whether redis-py's options for a connection have all limits."""
    limits = (kwargs.get("socket_timeout"), kwargs.get("socket_connect_timeout"))
    if not over_network:
        return limits[0] == SOCKET_TIMEOUT_S and not kwargs.get("socket_keepalive")
    return limits == (SOCKET_TIMEOUT_S, CONNECT_TIMEOUT_S) and bool(kwargs["socket_keepalive"])


@pytest.mark.parametrize("make", [redis_client, async_redis_client])
@pytest.mark.parametrize("url", ["redis://h:1/0", TLS, "unix:///r.sock", SENTINEL])
def test_clients_of_ours_are_bounded(make: Callable[[str], Any], url: str) -> None:
    kwargs = make(url).connection_pool.connection_kwargs
    assert bounded(kwargs, over_network=not url.startswith("unix"))


@pytest.mark.parametrize("url", ["redis://h:1/0", TLS, "unix:///r.sock", SENTINEL])
def test_celerys_backend_is_bounded(url: str) -> None:
    backend = make_app(Settings.load(redis_url=url)).backend
    assert bounded(backend.connparams, over_network=not url.startswith("unix"))
    if url == SENTINEL:
        sentinel = backend._get_sentinel_instance(**backend.connparams)
        for each in sentinel.sentinels:
            assert bounded(each.connection_pool.connection_kwargs, over_network=True)
    else:  # as its connections take them
        backend.client.connection_pool.make_connection()


def test_kombus_channels_are_bounded(redis_url: str, redis: redis_py.Redis) -> None:
    app = make_app(Settings.load(redis_url=redis_url))
    with app.connection() as connection:
        channel = connection.channel()
        for pool in (channel.pool, channel.async_pool):
            assert bounded(pool.connection_kwargs, over_network=True)
            assert pool.connection_kwargs["socket_keepalive_options"] == KEEPALIVE_OPTIONS
        assert channel.brpop_timeout < SOCKET_TIMEOUT_S, "or waiting for a message would time out"
    let_go(app)


def test_kombu_takes_all_limits_that_we_give() -> None:
    """An option that it did not know would be passed over in silence."""
    for url in ("redis://h:1/0", "unix:///r.sock"):
        assert set(socket_limits(url)) <= set(Channel.from_transport_options)


def test_a_connection_asks_a_silent_peer(redis_url: str) -> None:
    with redis_client(redis_url) as client:
        connection = client.connection_pool.get_connection()
        sock = connection._sock
        assert isinstance(sock, socket.socket)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert KEEPALIVE_OPTIONS
        for option, value in KEEPALIVE_OPTIONS.items():
            assert sock.getsockopt(socket.IPPROTO_TCP, option) == value


@pytest.mark.parametrize("ask", ["publish", "store", "read", "ping"])
def test_celerys_side_gives_a_redis_up_that_accepts_and_never_answers(
    monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    monkeypatch.setattr(connect, "SOCKET_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        app = make_app(Settings.load(redis_url=url))
        app.conf.task_publish_retry = False
        await_no_results(app)
        asking: dict[str, Callable[[], object]] = {
            "publish": lambda: app.send_task("x", queue="q"),
            "store": lambda: app.backend.client.set("k", b"v"),
            "read": lambda: app.AsyncResult("id").state,
            "ping": lambda: app.connection_for_write().channel(),
        }
        with pytest.raises((OSError, redis_py.RedisError, OperationalError)):
            asking[ask]()
