"""Redis users of the kinds that attack inferq or use it, on the server of a test.

`push_only` needs Redis 6.2 or newer, or a Valkey. The roles, those of deploy/redis/users.acl, tell
reading from writing by key (`%R~`, `%W~`): they need Redis 7.0 or newer, or a Valkey. On an older
one a test that asks for a role is skipped.

Users have names that no other test takes, and are deleted at the end, with their connections: so
tests may share a server. The fixture `users` of conftest.py makes them on the test's `redis_url`;
for another server: ``with Users(server.url) as users``.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import pytest
import redis as redis_py

from helpers.deploy import ROOT

USERS_FILE: Final = ROOT / "deploy" / "redis" / "users.acl"
#: May push to the queues of all models, and do nothing else at all: not even PING.
PUSH_ONLY: Final = ("resetchannels", "~inferq.*", "-@all", "+lpush")
ROLES_SINCE: Final = (7, 0)


def roles() -> dict[str, list[str]]:
    """The users of deploy/redis/users.acl: role → rules, without passwords."""
    lines = (line for line in USERS_FILE.read_text().splitlines() if line[:1] not in {"", "#"})
    users: dict[str, list[str]] = {}
    for line in lines:
        word, role, *rules = line.split()
        assert word == "user", line
        users[role] = rules
    return users


class Users:
    """Users on the server at `redis_url`, each made when it is first asked for.

    As a context manager it deletes them at the end.
    """

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._owner = redis_py.Redis.from_url(redis_url, socket_timeout=10.0)
        self._suffix = secrets.token_hex(4)
        self._password = secrets.token_hex(16)
        self._made: dict[str, str] = {}
        self._clients: list[redis_py.Redis] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients:
            client.close()
        if self._made:
            with suppress(redis_py.ConnectionError):  # the test may have ended its server
                self._owner.acl_deluser(*self._made.values())
        self._owner.close()

    def push_only(self) -> redis_py.Redis:
        """A client of a user that may LPUSH to queues, and nothing else."""
        self._make("push-only", PUSH_ONLY)
        return self._client("push-only")

    def url(self, role: str) -> str:
        """The URL for a role of deploy/redis/users.acl: producer, canceller, worker or watcher."""
        if role not in self._made:
            version = str(self._owner.info("server")["redis_version"])
            if tuple(map(int, version.split(".")[:2])) < ROLES_SINCE:
                pytest.skip(f"Redis {version} cannot tell reading from writing by key")
            self._make(role, roles()[role])
        return self._url(role)

    def connect(self, role: str, **options: Any) -> redis_py.Redis:
        """A client of a role; `options` go to redis-py."""
        self.url(role)
        return self._client(role, **options)

    def refused(self) -> list[str]:
        """What these users were refused since the start: "role: what, in which context".

        The server remembers some 128 refusals, of all users together.
        """
        mine = {user: role for role, user in self._made.items()}
        told: Any = self._owner.acl_log()
        return [
            f"{mine[each['username']]}: {each['reason']} {each['object']} ({each['client-info']})"
            for each in told
            if each["username"] in mine
        ]

    def _make(self, kind: str, rules: tuple[str, ...] | list[str]) -> None:
        if kind in self._made:
            return
        name = f"{kind}-{self._suffix}"
        owner: Any = self._owner
        owner.execute_command("ACL", "SETUSER", name, "reset", "on", f">{self._password}", *rules)
        self._made[kind] = name

    def _url(self, kind: str) -> str:
        parts = urlsplit(self._redis_url)
        at = f"{self._made[kind]}:{self._password}@{parts.netloc.rpartition('@')[2]}"
        return parts._replace(netloc=at).geturl()

    def _client(self, kind: str, **options: Any) -> redis_py.Redis:
        # Nothing but what it is told goes out on its connections: no CLIENT SETINFO, no PING.
        given = {"socket_timeout": 10.0, "driver_info": None, **options}
        client = redis_py.Redis.from_url(self._url(kind), **given)
        self._clients.append(client)
        return client
