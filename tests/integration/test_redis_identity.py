"""`inferq health` looks at the workers of its own Redis, whatever else runs on the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from helpers.repository import fake_model
from helpers.wait import until

from inferq.shared.settings import Settings
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.supervision.health import SERVING, Beat, read_beat
from inferq.workers.supervision.redis_identity import RedisPlace, place_of, run_id_of

NewRedis = Callable[..., EmbeddedRedis]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this host's heartbeats are."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for variable in ("INFERQ_REDIS_URL", "CELERY_BROKER_URL", "INFERQ_HEARTBEAT_FILE"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / f"inferq-{os.getuid()}"
    folder.mkdir(mode=0o700)
    return folder


def ask(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inferq.workers.cli", "health", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write(folder: Path, node: str, redis: RedisPlace | None, **given: object) -> None:
    now = time.monotonic() + 60
    good = Beat(os.getpid(), node, SERVING, now, now, 0, 0, False, 0.0, redis=redis)
    beat = msgspec.structs.replace(good, **given)
    (folder / f"{node}.json").write_bytes(msgspec.json.encode(beat))


def place(url: str, **given: object) -> RedisPlace:
    return place_of(Settings.load(redis_url=url, **given))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("redis://localhost:6379/0", "redis://:secret@127.0.0.1"),
        ("redis://LocalHost/3", "rediss://user:word@[::1]:6379/3"),
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock?db=0"),
        ("sentinel://a;sentinel://b:5", "sentinel://:word@b:5/0;sentinel://a:26379"),
    ],
)
def test_one_redis_is_known_under_each_spelling_of_its_url(one: str, other: str) -> None:
    assert place(one) == place(other)
    assert place(one).digest == place(other).digest
    assert "word" not in str(place(other))


def test_databases_prefixes_and_masters_are_told_apart() -> None:
    url = "redis://h:1/0"
    sentinels = "sentinel://a/0"
    places = {
        place(url),
        place("redis://h:1/1"),
        place("redis://h:2/0"),
        place("redis://i:1/0"),
        place(url, global_keyprefix="p:"),
        place("unix:///h"),
        place(sentinels),
        place(sentinels, sentinel_master="second"),
    }
    assert len(places) == len({each.digest for each in places}) == 8


def test_a_worker_of_another_redis_is_passed_over_and_named(
    redis_url: str, new_redis: NewRedis, folder: Path
) -> None:
    other = new_redis()
    write(folder, "mine@h", place(redis_url))
    write(folder, "gone@h", place(other.url), pid=2**22)
    answer = ask("--redis-url", redis_url)
    assert (answer.returncode, "mine@h: ok" in answer.stdout) == (0, True)
    assert "gone@h" not in answer.stdout
    assert f"passed over, as of other Redis servers: gone@h of 127.0.0.1:{other.port}/0" in (
        answer.stderr
    )
    (told,) = json.loads(ask("--redis-url", redis_url, "--json").stdout)
    assert told["node"] == "mine@h"
    answer = ask("--redis-url", other.url)
    assert (answer.returncode, "gone@h: its process" in answer.stdout) == (1, True)
    assert "mine@h" not in answer.stdout
    assert ask("--file", str(folder / "gone@h.json"), "--redis-url", redis_url).returncode == 1
    assert ask().returncode == 1, "without a URL all are looked at"


def test_where_all_workers_are_of_others_none_is_there(redis_url: str, folder: Path) -> None:
    write(folder, "theirs@h", place("redis://elsewhere:1"))
    answer = ask("--redis-url", redis_url)
    assert answer.returncode == 1
    assert "theirs@h of elsewhere:1/0" in answer.stderr
    assert f"no worker's heartbeat of {place(redis_url)}" in answer.stderr


def test_a_worker_that_reaches_the_same_redis_by_a_socket_is_its_own(
    new_redis: NewRedis, folder: Path
) -> None:
    socket = folder.parent / "redis.sock"
    server = new_redis(args=["--unixsocket", str(socket)])
    url = f"unix://{socket}"
    run_id = run_id_of(Settings.load(redis_url=url))
    write(folder, "by-socket@h", place(url), run_id=run_id)
    assert "by-socket@h: ok" in ask("--redis-url", server.url).stdout
    assert ask("--redis-url", f"{server.url[:-1]}5").returncode == 1, "of another database"
    server.kill()
    assert ask("--redis-url", server.url).returncode == 1, "nobody can tell"


def test_a_heartbeat_that_names_no_redis_is_looked_at(redis_url: str, folder: Path) -> None:
    write(folder, "old@h", None)
    assert "old@h: ok" in ask("--redis-url", redis_url).stdout


def test_two_stacks_with_workers_of_one_name_do_not_share_a_heartbeat(
    redis_url: str, new_redis: NewRedis, folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    fake_model(root, "m", knobs="lanes = 1\nwarm_up = false")
    other = new_redis()
    workers = []
    try:
        for url in (redis_url, other.url):
            command = [
                sys.executable, "-m", "inferq.workers.cli", "worker", "--models", str(root),
                "-n", "gpu0@h", "--redis-url", url,
            ]  # fmt: skip
            workers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            until(lambda url=url: ask("--redis-url", url).returncode == 0, 60, "it is healthy")  # type: ignore[misc]
        assert len(list(folder.glob("*.json"))) == 2
        beats = [read_beat(path) for path in folder.glob("*.json")]
        assert {beat.run_id for beat in beats if beat} == {
            run_id_of(Settings.load(redis_url=url)) for url in (redis_url, other.url)
        }
        workers[1].send_signal(signal.SIGKILL)
        until(lambda: ask("--redis-url", other.url).returncode == 1, what="that one is gone")
        assert ask("--redis-url", redis_url).returncode == 0
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)
