"""The password of Redis shows up nowhere: in no log, file, page, message or list of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py
from click.testing import CliRunner
from helpers.flower import FlowerProcess
from helpers.repository import fake_model, numbered
from helpers.wait import until
from helpers.worker import SupervisedWorker

from inferq.producer import Client, RedisUnavailable
from inferq.workers.cli import inferq
from inferq.workers.process.embedded import EmbeddedRedis

WORD = "geheim-4711"
PAGES = [
    "/", "/workers", "/workers?json=1", "/broker", "/tasks", "/inference", "/inference/data",
    "/metrics", "/api/workers?refresh=1", "/api/tasks", "/api/queues/length", "/api/task/types",
]  # fmt: skip


@pytest.fixture
def locked(new_redis: Callable[..., EmbeddedRedis]) -> EmbeddedRedis:
    """A server whose password is `WORD`."""
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as client:
        client.config_set("requirepass", WORD)
    return server


def command_lines(pid: int) -> str:
    """Of a process and all that descend from it."""
    folder = Path(f"/proc/{pid}")
    children = (folder / "task" / str(pid) / "children").read_text().split()
    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return "\n".join([line, *(command_lines(int(child)) for child in children)])


def test_no_log_file_page_or_list_of_processes_shows_the_password(
    locked: EmbeddedRedis, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m")
    url = locked.url.replace("://", f"://:{WORD}@")
    with SupervisedWorker(url, tmp_path, ["m"], name="quiet", args=["-l", "DEBUG"]) as worker:
        worker.child()
        with Client(url) as client:
            client.infer("m", {"x": numbered(1)}, timeout=60)
            assert WORD not in repr(client)
        assert "-n quiet@" in (lines := command_lines(worker.pid))
        assert WORD not in lines
        beat = worker.heartbeat.read_text()
        assert json.loads(beat)["node"].startswith("quiet@")
        assert WORD not in beat
        with FlowerProcess(url) as flower:
            (node,) = until(lambda: flower.get("/api/workers?refresh=1").json(), 60, "its worker")
            until(lambda: "quiet@" in flower.get("/inference/data").body, 30, "Flower reads")
            for page in [*PAGES, f"/worker/{node}"]:
                reply = flower.get(page)
                assert reply.status == 200, page
                assert WORD not in reply.body, page
            assert "broker_url" in flower.get(f"/worker/{node}").body, "its settings are shown"
            assert WORD not in command_lines(flower.process.pid)
            assert WORD not in flower.log
        for command in (["queues"], ["doctor", "--json"], ["health"], ["dead", "list"]):
            run = CliRunner(env={"INFERQ_REDIS_URL": url}).invoke(inferq, command)
            assert WORD not in run.output, command
        locked.kill()  # what is said of a Redis that is away
        until(lambda: "connection broke" in worker.log, 30, "the worker says so")
        locked.start()
        assert WORD not in worker.log


def test_no_message_about_a_wrong_password_shows_it(locked: EmbeddedRedis, tmp_path: Path) -> None:
    fake_model(tmp_path, "m")
    url = locked.url.replace("://", f"://:{WORD}x@")
    with Client(url) as client, pytest.raises(RedisUnavailable) as caught:
        client.infer("m", {"x": numbered(1)})
    assert WORD not in str(caught.value)
    for command in (["queues"], ["doctor", "--json"], ["dead", "list"]):
        run = CliRunner(env={"INFERQ_REDIS_URL": url}).invoke(inferq, command)
        assert run.exit_code == 1, command
        assert WORD not in run.output, command


def test_what_a_command_was_told_by_its_option_its_children_are_told_by_their_environment(
    redis_url: str, tmp_path: Path
) -> None:
    """The command's own line is for the operator, who is warned; its children's are for us."""
    fake_model(tmp_path, "m")
    url = redis_url.replace("://", f"://default:{WORD}@")
    with SupervisedWorker(
        redis_url, tmp_path, ["m"], name="told", args=["--redis-url", url]
    ) as worker:
        worker.child()
        own, *children = command_lines(worker.pid).splitlines()
        assert WORD in own
        assert children
        assert not any(WORD in line for line in children)
        assert "--redis-url holds a password" in worker.log
        assert worker.log.count("list of processes") == 1
        assert WORD not in worker.log
