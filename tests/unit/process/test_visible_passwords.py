"""A URL with a password on a command line is warned of, once, without showing it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from inferq.workers.process.visible_passwords import visible_password


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["queues", "--redis-url", "redis://:geheim@h:1/0"], "--redis-url holds a password, whi"),
        (["queues", "--redis-url=rediss://u:geheim@h"], "--redis-url holds a password, which"),
        (["-b", "sentinel://h1:1;sentinel://:geheim@h2", "worker"], "-b holds a password, which"),
        (["-bredis://:geheim@h"], "-b holds a password, which every user of this host sees"),
        (["--broker=redis+socket://:geheim@/r.sock"], "--broker holds a password, which every us"),
        (["flower", "--broker-api=http://guest:geheim@h/api"], "--broker-api holds a password"),
        (["x", "--redis-url", "redis://h?password=geheim&db=1"], "--redis-url holds a password"),
        (["x", "redis://:geheim@h"], "a URL holds a password, which every user of this host sees"),
        (["x", "--redis-url", "redis://:ge/[heim@h"], "--redis-url holds a password, which every"),
        (["flower", "--basic-auth", "ops:geheim"], "--basic-auth holds a password, which every us"),
        (["flower", "--basic-auth", "ops:geheim=="], "--basic-auth holds a password, which every"),
        (["flower", "--basic_auth=ops:geheim"], "--basic_auth holds a password, which every user"),
        (["flower", "--cookie_secret=geheim"], "--cookie_secret holds a password, which every us"),
        (["flower", "--oauth2-secret", "geheim"], "--oauth2-secret holds a password, which every"),
    ],
)
def test_a_password_is_told_of_and_not_shown(arguments: list[str], told: str) -> None:
    found = visible_password(arguments)
    assert found is not None
    assert found.startswith(told)
    assert "geheim" not in found
    assert "expected it in the environment: " in found


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["queues", "--redis-url", "redis://h:6379/0"],
        ["--redis-url=redis://user@h:6379/0"],
        ["-b", "sentinel://h1:26379/0;sentinel://user@h2:26379/0"],
        ["--redis-url", "rediss://h/0?ssl_ca_certs=/a@b:c"],
        ["--models", "/a:b@c"],
        ["flower", "--basic-auth"],
        ["flower", "--port=5555", "--auth=.*@example.com"],
    ],
)
def test_where_there_is_none_nothing_is_told(arguments: list[str]) -> None:
    assert visible_password(arguments) is None


@pytest.mark.parametrize(
    "command",
    [
        ["inferq.workers.cli", "queues", "--redis-url"],
        ["celery", "-A", "inferq.workers.app", "inferq", "queues", "--redis-url"],
    ],
    ids=["inferq", "celery"],
)
def test_commands_warn_in_one_line(command: list[str]) -> None:
    url = "redis://:geheim@127.0.0.1:1/0"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "INFERQ_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, url], env=env, capture_output=True, text=True, timeout=60
    )
    lines = [line for line in done.stderr.splitlines() if "list of processes" in line]
    assert len(lines) == 1, done.stderr
    assert "--redis-url holds a password" in lines[0]
    assert "geheim" not in done.stderr + done.stdout
