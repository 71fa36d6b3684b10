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
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
import redis as redis_py

from helpers.deploy import ROOT
from helpers.scoped import Scoped

USERS_FILE: Final = ROOT / "deploy" / "redis" / "users.acl"
#: May push to the queues of all models, and do nothing else at all: not even PING.
PUSH_ONLY: Final = ("resetchannels", "~inferq.*", "-@all", "+lpush")
ROLES_SINCE: Final = (7, 2)


def roles() -> dict[str, list[str]]:
    """The users of deploy/redis/users.acl: role → rules, without passwords."""
    lines = (line for line in USERS_FILE.read_text().splitlines() if line[:1] not in {"", "#"})
    users: dict[str, list[str]] = {}
    for line in lines:
        word, role, *rules = line.split()
        assert word == "user", line
        users[role] = rules
    return users


def configuration(password: str) -> str:
    """Lines of a server's configuration with the users of all roles, who have one password.

    Unlike `Users` they are there again after the server has ended and started.
    """
    lines = (f"user {role} on >{password} {' '.join(rules)}\n" for role, rules in roles().items())
    return "".join(lines)


def with_user(redis_url: str, user: str, password: str) -> str:
    """`redis_url` as `user` connects."""
    parts = urlsplit(redis_url)
    return parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()


class Users(Scoped):
    """Users on the server at `redis_url`, each made when it is first asked for.

    As a context manager it deletes them at the end.
    """

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._owner = redis_py.Redis.from_url(redis_url, socket_timeout=10.0)
        self._suffix = secrets.token_hex(4)
        self._password = secrets.token_hex(16)
        #: Role and rules → name.
        self._made: dict[tuple[str, ...], str] = {}
        self._clients: list[redis_py.Redis] = []

    def _end(self) -> None:
        for client in self._clients:
            client.close()
        if self._made:
            with suppress(redis_py.ConnectionError):  # the test may have ended its server
                self._owner.acl_deluser(*self._made.values())
        self._owner.close()

    def push_only(self) -> redis_py.Redis:
        """A client of a user that may LPUSH to queues, and nothing else."""
        return self._client(self._make("push-only", list(PUSH_ONLY)))

    def url(self, role: str, *more: str) -> str:
        """The URL for a role of deploy/redis/users.acl: producer, canceller, worker or watcher.

        `more`: rules that it has besides, as an application's own queues ask for.
        """
        return self._url(self.name(role, *more))

    def name(self, role: str, *more: str) -> str:
        """The user that `url` connects as."""
        version = str(self._owner.info("server")["redis_version"])
        if tuple(map(int, version.split(".")[:2])) < ROLES_SINCE:
            pytest.skip(f"Redis {version} does not know all rules of {USERS_FILE.name}")
        return self._make(role, [*roles()[role], *more])

    def connect(self, role: str, **options: Any) -> redis_py.Redis:
        """A client of a role; `options` go to redis-py."""
        return self._client(self.name(role), **options)

    def refused(self) -> list[str]:
        """What these users were refused since the start: "role: what (by which command, where)".

        The server remembers some 128 refusals, of all users together.
        """
        mine = {user: role for (role, *_), user in self._made.items()}
        told: Any = self._owner.acl_log()
        return [
            f"{mine[each['username']]}: {each['reason']} {each['object']}"
            f" (by {each['client-info']['cmd']}, {each['context']})"
            for each in told
            if each["username"] in mine
        ]

    def _make(self, role: str, rules: list[str]) -> str:
        """The name of a user with these rules, who is made if there is none yet."""
        made = self._made.get((role, *rules))
        if made is None:
            made = self._made[role, *rules] = f"{role}-{len(self._made)}-{self._suffix}"
            owner: Any = self._owner
            owner.execute_command(
                "ACL", "SETUSER", made, "reset", "on", f">{self._password}", *rules
            )
        return made

    def _url(self, user: str) -> str:
        return with_user(self._redis_url, user, self._password)

    def _client(self, user: str, **options: Any) -> redis_py.Redis:
        # Nothing but what it is told goes out on its connections: no CLIENT SETINFO, no PING.
        given = {"socket_timeout": 10.0, "driver_info": None, **options}
        client = redis_py.Redis.from_url(self._url(user), **given)
        self._clients.append(client)
        return client
