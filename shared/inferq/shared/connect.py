"""Makes redis-py clients from a URL, in every form that kombu takes; every wait has a timeout.

    redis://[[user]:password@]host[:port][/db]      TCP
    rediss://…[?ssl_…]                              TLS, see tls.py
    unix://[[user]:password@]/path[?db=…]           Unix socket
    sentinel://[:password@]host[:port][/db][;…]     the master that Sentinels name, Celery's form

Celery writes ``redis+socket://`` for a socket, which is accepted too. No message shows a password.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.shared.errors import ConfigError, RedisUnavailable
from inferq.shared.tls import split_tls
from inferq.shared.tls_mistakes import (
    AsyncPlainConnection,
    AsyncTlsConnection,
    PlainConnection,
    TlsConnection,
    WrongTls,
)

#: Seconds.
CONNECT_TIMEOUT_S: Final = 2.0
#: Seconds that one reply may take. A blocking command's own timeout must be shorter.
SOCKET_TIMEOUT_S: Final = 5.0
#: Seconds of idleness after which a pooled connection is checked with PING before its next use.
HEALTH_CHECK_S: Final = 15
#: After so many seconds of silence the kernel probes the peer. It takes the connection for broken
#: after so many probes, one every so many seconds.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
KEEPALIVE_OPTIONS: Final = {
    int(getattr(socket, name)): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)
}
#: Connections that one pool may open. Each thread that is talking to Redis uses one.
MAX_CONNECTIONS: Final = 1_000
#: The first Redis with LMOVE, BLMOVE and the other commands that claims need.
MINIMUM_VERSION: Final = (6, 2)
SENTINEL_PORT: Final = 26_379

_SCHEMES: Final = ("redis", "rediss", "unix", "sentinel")


@dataclass(frozen=True)
class Server:
    """What `check_server` found out. `run_id` changes with every start of Redis."""

    version: tuple[int, ...]
    run_id: str
    #: What Redis evicts once it is full: its `maxmemory-policy`; None if it evicts nothing.
    evicts: str | None = None


def redact(url: str) -> str:
    """`url` without its passwords, fit for a log line."""
    hidden = re.sub(r"^([a-z+]*://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"(?i)(password=)[^&;]*", r"\1***", hidden)


def redis_client(url: str, *, sentinel_master: str = "mymaster", **options: Any) -> redis.Redis:
    """A client with a pool of its own; it connects when first used.

    Replies are bytes, the protocol is RESP3. After a broken connection a command is tried once more
    at once; after a timeout it is not. `options` go to redis-py and win. ConfigError for a URL of
    another form.
    """
    settings = _options(url, Retry(NoBackoff(), 1, (redis.ConnectionError,)), options)
    scheme, plain, tls = _parts(url)
    if scheme != "sentinel":
        with _naming(url):
            client = redis.Redis.from_url(plain, **tls, **settings)
        if scheme != "unix":
            client.connection_pool.connection_class = TlsConnection if tls else PlainConnection
        return client
    at = _parse_sentinel(plain)
    module: Any = redis.sentinel
    sentinel = module.Sentinel(at.hosts, sentinel_kwargs=_socket_options(settings))
    master: redis.Redis = sentinel.master_for(sentinel_master, **{**settings, **at.options})
    return master


def async_redis_client(
    url: str, *, sentinel_master: str = "mymaster", **given: Any
) -> redis.asyncio.Redis:
    """The asyncio twin of `redis_client`."""
    retry = redis.asyncio.retry.Retry(NoBackoff(), 1, (redis.ConnectionError,))
    settings = _options(url, retry, given)
    scheme, plain, tls = _parts(url)
    if scheme != "sentinel":
        with _naming(url):
            client = redis.asyncio.Redis.from_url(plain, **tls, **settings)
        if scheme != "unix":
            kind = AsyncTlsConnection if tls else AsyncPlainConnection
            client.connection_pool.connection_class = kind
        return client
    at = _parse_sentinel(plain)
    module: Any = redis.asyncio.sentinel
    sentinel = module.Sentinel(at.hosts, sentinel_kwargs=_socket_options(settings))
    options = {**settings, **at.options}
    master: redis.asyncio.Redis = sentinel.master_for(sentinel_master, **options)
    return master


def check_server(client: redis.Redis) -> Server:
    """Ask Redis what it is. ConfigError: a cluster node, older than 6.2, or TLS is set up wrongly.

    RedisUnavailable if it does not answer.
    """
    try:
        server = judge_server(client.info("server"), client.info("cluster"))
        memory = client.info("memory")
    except WrongTls as problem:
        raise ConfigError(f"Redis cannot be reached: {problem}") from problem
    except (redis.ConnectionError, redis.TimeoutError) as problem:
        raise RedisUnavailable(f"Redis does not answer: {problem}") from problem
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    return replace(server, evicts=policy if policy != "noeviction" else None)


async def async_check_server(client: redis.asyncio.Redis) -> Server:
    """The asyncio twin of `check_server`."""
    try:
        return judge_server(await client.info("server"), await client.info("cluster"))
    except WrongTls as problem:
        raise ConfigError(f"Redis cannot be reached: {problem}") from problem
    except (redis.ConnectionError, redis.TimeoutError) as problem:
        raise RedisUnavailable(f"Redis does not answer: {problem}") from problem


def judge_server(server: Mapping[str, Any], cluster: Mapping[str, Any]) -> Server:
    """Judge a server by INFO's sections `server` and `cluster`. Raises as `check_server`."""
    if int(cluster.get("cluster_enabled", 0)):
        raise ConfigError(
            "this Redis runs in cluster mode; expected a single Redis or Sentinels: "
            "queues, claims and results must change in one transaction"
        )
    text = str(server.get("redis_version", "0"))
    version = tuple(int(part) for part in re.findall(r"\d+", text))
    if version < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise ConfigError(f"this Redis is version {text}; expected {wanted} or newer (or a Valkey)")
    return Server(version, str(server.get("run_id", "")))


def parse_info(reply: bytes | str) -> dict[str, str]:
    """Redis' answer to INFO."""
    text = reply.decode() if isinstance(reply, bytes) else reply
    return dict(re.findall(r"^(\w+):(.*?)\r?$", text, re.MULTILINE))


def socket_limits(url: str) -> dict[str, Any]:
    """redis-py's options (kombu's, too) that bound every wait on a socket to the Redis at `url`."""
    limits: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S}
    limits["socket_connect_timeout"] = CONNECT_TIMEOUT_S
    if _parts(url)[0] != "unix":  # on a Unix socket the kernel knows when the peer is gone
        limits["socket_keepalive"] = True
        limits["socket_keepalive_options"] = KEEPALIVE_OPTIONS
    return limits


def _options(url: str, retry: object, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **socket_limits(url),
        "protocol": 3,
        "decode_responses": False,
        "health_check_interval": HEALTH_CHECK_S,
        "max_connections": MAX_CONNECTIONS,
        "retry": retry,
        **given,
    }


def _socket_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.startswith("socket_")}


def _parts(url: str) -> tuple[str, str, dict[str, Any]]:
    """Its scheme, `url` as redis-py reads it without TLS' options, and those."""
    plain, tls = split_tls(re.sub(r"^redis\+socket://", "unix://", url))
    scheme = plain.partition("://")[0]
    if scheme not in _SCHEMES or "://" not in plain:
        expected = ", ".join(f"{known}://" for known in _SCHEMES)
        raise ConfigError(f"Redis URL {redact(url)!r}; expected one of {expected}")
    return scheme, plain, tls.options() if tls else {}


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn what urllib and redis-py raise about `url` into a ConfigError.

    Their own messages are dropped: they may quote part of the password.
    """
    try:
        yield
    except ValueError:
        raise ConfigError(
            f"Redis URL {redact(url)!r} cannot be read; expected scheme://[[user]:password@]"
            "host[:port][/db], with special characters of the password percent-encoded"
        ) from None


@dataclass(frozen=True)
class _Sentinels:
    hosts: list[tuple[str, int]]
    #: For the connection to the master: db, username, password.
    options: dict[str, Any]


def _parse_sentinel(url: str) -> _Sentinels:
    hosts: list[tuple[str, int]] = []
    options: dict[str, Any] = {}
    for part in filter(None, url.split(";")):
        with _naming(url):
            parsed = urlsplit(part)
            host, port = parsed.hostname, parsed.port or SENTINEL_PORT
            db = int(parsed.path.strip("/") or 0)
        if parsed.scheme != "sentinel" or host is None:
            raise ConfigError(
                f"Redis URL {redact(url)!r}; expected sentinel://host:port[/db] parts joined by ';'"
            )
        hosts.append((host, port))
        found = {
            "db": db,
            "username": unquote(parsed.username) if parsed.username else None,
            "password": unquote(parsed.password) if parsed.password else None,
        }
        options = {**{key: value for key, value in found.items() if value is not None}, **options}
    return _Sentinels(hosts, options)
