"""Checks the Redis that holds queues, claims and results."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from inferq.shared.connect import judge_server, redact, redis_client
from inferq.shared.errors import ConfigError
from inferq.shared.names import Names
from inferq.workers.claims.wrong_type import find_wrong_types
from inferq.workers.doctor.finding import Finding, error, ok, warning
from inferq.workers.queues.depths import DepthReader

#: PINGs whose median is shown, after one that connects.
PINGS: Final = 11
#: Milliseconds from which on a round trip counts as slow: each batch takes several.
SLOW_MS: Final = 5.0
#: Seconds that this host's clock may differ from Redis'.
CLOCK_S: Final = 1.0
#: Share of maxmemory from which on Redis counts as nearly full.
NEARLY_FULL: Final = 0.8

_FOREVER: Final = "appendonly yes and appendfsync everysec (redis.conf, or CONFIG SET)"


def unreachable(url: str, problem: Exception) -> Finding:
    """Why the Redis at `url` cannot be checked."""
    at = f"Redis at {redact(url)}"
    text = str(problem)
    if isinstance(problem, AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return error(
            "redis",
            f"{at} refuses the user or password: {text}",
            "put the right ones into the URL: redis://user:password@host:port/db, with special "
            "characters percent-encoded",
        )
    if isinstance(problem, ResponseError):
        return error("redis", f"{at} refuses to talk: {text}", "see the Redis server's log")
    return error(
        "redis",
        f"{at} does not answer: {text}",
        "correct the URL (--redis-url, INFERQ_REDIS_URL), or start Redis there",
    )


def open_to_all(url: str) -> Iterator[Finding]:
    """Whether the Redis at `url`, which has a password, also accepts clients without one.

    Sentinels are not checked. Raises redis' errors.
    """
    if not url.startswith(("redis://", "rediss://", "unix://")) or redact(url) == url:
        return
    bare = re.sub(r"^([a-z]+://).*@", r"\1", url, flags=re.DOTALL)
    bare = re.sub(r"(?i)\b(username|password)=[^&]*&?", "", bare)
    with redis_client(bare) as nobody:
        try:
            nobody.ping()
        except (ResponseError, AuthenticationError):
            return
    yield warning(
        "password",
        "Redis accepts clients without a password: its user default has none",
        "set one, or switch that user off: ACL SETUSER default off; docs/deploy.md",
    )


def examine(client: redis.Redis, url: str) -> Iterator[Finding]:
    """All findings about this server. Raises redis' errors if it cannot be asked."""
    client.ping()
    yield ok("redis", f"{redact(url)} answers")
    info: dict[str, Any] = client.info()
    try:
        server = judge_server(info, info)
    except ConfigError as problem:
        yield error("version", problem.message, "run a newer Redis or Valkey, without cluster mode")
    else:
        kind = "Valkey" if "valkey_version" in info else "Redis"
        version = info.get("valkey_version") or ".".join(map(str, server.version))
        yield ok("version", f"{kind} {version}")
    yield _latency(client)
    yield _clock(client)
    yield from _persistence(info, _setting(client, "save"), _setting(client, "appendfsync"))
    yield from _memory(info)


def keys(client: redis.Redis, names: Names) -> Iterator[Finding]:
    """The keys of all models that Redis knows, that have the wrong type. Raises redis' errors."""
    models = DepthReader(client, names).models()
    wrong = find_wrong_types(client, names, models)
    for each in wrong:
        found = f"{each.key!r} is a {each.found}; expected a {each.expected}. {each.effect} so long"
        yield error("keys", found, "DEL it, or RENAME it if it is needed")
    if not wrong:
        yield ok("keys", f"those of {len(models)} models have the right types")


def _latency(client: redis.Redis) -> Finding:
    took = []
    for _ in range(PINGS):
        began = time.perf_counter()
        client.ping()
        took.append((time.perf_counter() - began) * 1000)
    median = statistics.median(took)
    found = f"{median:.2f} ms a round trip (median of {PINGS}, slowest {max(took):.2f} ms)"
    if median < SLOW_MS:
        return ok("latency", found)
    return warning("latency", found, f"have Redis nearer: expected less than {SLOW_MS:g} ms")


def _clock(client: redis.Redis) -> Finding:
    before = time.time()
    seconds, micros = client.time()
    ahead = seconds + micros / 1e6 - (before + time.time()) / 2
    found = f"Redis' clock is {abs(ahead):.3f} s {'ahead of' if ahead >= 0 else 'behind'} ours"
    if abs(ahead) < CLOCK_S:
        return ok("clock", found)
    return warning(
        "clock",
        found,
        "keep both by NTP: Celery's ETAs and `expires` are written by one clock and read by "
        "another (inferq's own deadlines go by Redis' alone)",
    )


def _persistence(info: Mapping[str, Any], save: str | None, fsync: str | None) -> Iterator[Finding]:
    check = "persistence"
    if int(info.get("aof_enabled", 0)):
        if info.get("aof_last_write_status", "ok") != "ok":
            yield error(
                check,
                "appendonly, but its last write failed: Redis refuses all writes",
                "see Redis' log; is its disk full?",
            )
        elif fsync == "no":
            yield warning(
                check,
                "appendonly with appendfsync no: a machine that dies loses what its "
                "kernel had not written, usually the last 30 s",
                "set appendfsync everysec",
            )
        else:
            lost = "nothing" if fsync == "always" else "at most about the last second"
            yield ok(check, f"appendonly: a Redis that dies loses {lost}")
    elif save == "":
        yield warning(
            check,
            "none: if Redis ends, all requests, results and dead letters are lost",
            f"set {_FOREVER}",
        )
    else:
        points = f" ({save})" if save else ""
        yield warning(
            check,
            f"snapshots only{points}: a Redis that dies loses all since the last one, "
            f"{int(info.get('rdb_changes_since_last_save', 0))} changes by now",
            f"set {_FOREVER}",
        )
    if save != "" and info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield error(
            check,
            "the last snapshot failed: Redis refuses writes until one succeeds",
            "see Redis' log; is its disk full, or vm.overcommit_memory 0?",
        )


def _memory(info: Mapping[str, Any]) -> Iterator[Finding]:
    most, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    policy = str(info.get("maxmemory_policy", "noeviction"))
    limit = f"maxmemory {most / 1e6:.0f} MB" if most else "no maxmemory"
    if policy == "noeviction":
        yield ok("eviction", f"maxmemory-policy noeviction, {limit}")
    else:
        when = "once it is full" if most else "once it has a maxmemory"
        yield error(
            "eviction",
            f"maxmemory-policy {policy}, {limit}: Redis drops requests, payloads and "
            f"results {when}",
            "set maxmemory-policy noeviction (redis.conf, or CONFIG SET)",
        )
    if most and used >= NEARLY_FULL * most:
        yield warning(
            "memory",
            f"{used / 1e6:.0f} of {most / 1e6:.0f} MB used: a full Redis takes no requests",
            "raise maxmemory, or lower max_queue_bytes and INFERQ_RESULT_EXPIRES_S",
        )


def _setting(client: redis.Redis, name: str) -> str | None:
    """A setting; None if it may not be read, as in some managed services."""
    try:
        told = client.config_get(name)
    except (redis.ConnectionError, redis.TimeoutError):
        raise
    except RedisError:
        return None
    for key, value in told.items():
        if (key.decode() if isinstance(key, bytes) else key) == name:
            return value.decode() if isinstance(value, bytes) else str(value)
    return None
