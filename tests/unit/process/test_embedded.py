"""The embedded Redis comes up, comes back, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py
from helpers.wait import until

from inferq.shared.errors import ConfigError, RedisUnavailable
from inferq.workers.process.embedded import HOST, PORTS, EmbeddedRedis, find_server, free_port

NewRedis = Callable[..., EmbeddedRedis]


def _gone(pid: int) -> bool:
    """Whether the process ended (a zombie that nobody reaped has ended, too)."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_it_answers_at_its_url_as_soon_as_start_returns(new_redis: NewRedis) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.info("server")["process_id"] == server.pid


def test_its_port_is_outside_the_range_of_outgoing_connections(new_redis: NewRedis) -> None:
    assert new_redis().port in PORTS


def test_it_listens_on_loopback_only(new_redis: NewRedis) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as client:
        assert client.config_get("bind") == {"bind": HOST}


@pytest.mark.parametrize(
    "command",
    [
        ["CONFIG", "SET", "dir", "/tmp"],
        ["CONFIG", "SET", "dbfilename", "authorized_keys"],
        ["CONFIG", "SET", "logfile", "/tmp/x"],
        ["CONFIG", "REWRITE"],
        ["MODULE", "LOAD", "/tmp/x.so"],
        ["DEBUG", "SLEEP", "0"],
    ],
    ids=" ".join,
)
def test_others_of_this_host_who_may_use_it_have_it_write_no_file_and_run_no_code(
    command: list[str],
) -> None:
    """It has no password. (A redis-server before 7.0 knows no such limits.)"""
    with (
        EmbeddedRedis("valkey") as server,
        redis_py.Redis.from_url(server.url) as client,
        pytest.raises(redis_py.ResponseError),
    ):
        client.execute_command(*command)


def test_it_never_evicts(new_redis: NewRedis) -> None:
    with redis_py.Redis.from_url(new_redis(maxmemory=4_000_000).url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("maxmemory") == {"maxmemory": "4000000"}


def test_killed_and_started_again_it_has_the_same_port_and_data(new_redis: NewRedis) -> None:
    server = new_redis(appendonly=True, args=["--appendfsync", "always"])
    before = server.url, server.pid
    with redis_py.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
        server.kill()
        assert not server.running
        server.start()
        assert server.url == before[0]
        assert server.pid != before[1]
        assert client.get("kept") == b"yes"


def test_stop_ends_the_process_and_deletes_its_data(new_redis: NewRedis) -> None:
    server = new_redis(appendonly=True)
    pid = server.pid
    with redis_py.Redis.from_url(server.url) as client:
        directory = Path(client.config_get("dir")["dir"])
    assert directory.is_dir()
    server.stop()
    assert _gone(pid)
    assert not directory.exists()
    server.stop()


def test_a_taken_port_is_replaced_by_another(
    new_redis: NewRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], 0])
        module = "inferq.workers.process.embedded.free_port"
        monkeypatch.setattr(module, lambda: next(ports) or free_port())
        server = new_redis()
        assert server.port != taken.getsockname()[1]


def test_a_server_that_ends_at_once_is_an_error_with_its_log(redis_kind: str) -> None:
    server = EmbeddedRedis(redis_kind, args=["--no-such-option", "1"])
    with pytest.raises(RedisUnavailable, match=r"(?s)ended with status 1.*no-such-option"):
        server.start()
    assert not server.running


def test_it_dies_with_a_parent_that_was_sigkilled(redis_kind: str, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from inferq.workers.process.embedded import EmbeddedRedis\n"
        f"server = EmbeddedRedis({redis_kind!r}); server.start()\n"
        "print(server.pid, flush=True); sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TMPDIR": str(tmp_path),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not _gone(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate(timeout=10)
    until(lambda: _gone(pid), 10, "the server ended with its parent")


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'memcached'; expected one of valkey, redis-server"):
        find_server("memcached")


def test_a_missing_redis_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="no redis-server on PATH"):
        find_server("redis-server")
