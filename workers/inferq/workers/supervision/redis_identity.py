"""Which Redis a worker belongs to, as its heartbeat tells: several may share a host.

A URL has several spellings, and holds a password. Compared is what it leads to: the server's
address, and what keeps two stacks on one server apart. Where addresses differ (a socket and a port,
a name and a number) the server's own run id tells that it is the same.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec
import redis

from inferq.shared.connect import parse_info, redis_client
from inferq.shared.settings import Settings

#: What `inferq health` waits for an answer, in s.
_ANSWER_S: Final = 2.0
_LOOPBACK: Final = ("localhost", "ip6-localhost", "::1")
_PORT: Final = 6379


class RedisPlace(msgspec.Struct, frozen=True):
    """One stack's place: a server without its password, a database, a prefix of keys."""

    server: str
    db: int
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.server}/{self.db}{self.prefix and f' {self.prefix!r}'}"

    @property
    def digest(self) -> str:
        """Short, and fit for a file's name."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:8]


def place_of(settings: Settings) -> RedisPlace:
    """Where `settings` lead. Asks nobody. ConfigError for a URL that is none."""
    with redis_client(settings.redis_url, sentinel_master=settings.sentinel_master) as client:
        pool: Any = client.connection_pool
        given = pool.connection_kwargs
        if sentinels := getattr(pool, "sentinel_manager", None):
            hosts = [each.connection_pool.connection_kwargs for each in sentinels.sentinels]
            named = ",".join(sorted(_host(each) for each in hosts))
            server = f"{pool.service_name} of sentinels {named}"
        else:
            server = given.get("path") or _host(given)
    return RedisPlace(server, int(given.get("db") or 0), settings.global_keyprefix)


def _host(given: dict[str, Any]) -> str:
    host = str(given.get("host") or "localhost").lower()
    host = "127.0.0.1" if host in _LOOPBACK else host
    return f"{host}:{given.get('port') or _PORT}"


def run_id_of(settings: Settings) -> str:
    """The server's run id; empty if it does not answer."""
    try:
        with redis_client(
            settings.redis_url,
            sentinel_master=settings.sentinel_master,
            socket_timeout=_ANSWER_S,
        ) as client:
            reply: Any = client.execute_command("INFO", "server")
    except (redis.RedisError, OSError):
        return ""
    return str(reply["run_id"]) if isinstance(reply, dict) else parse_info(reply)["run_id"]
