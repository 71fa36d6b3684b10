"""Whatever a command of ours starts ends with it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis as redis_py
from helpers.repository import fake_model
from helpers.wait import until
from helpers.worker import Worker
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.workers.process.children import end_child
from inferq.workers.process.embedded import free_port

#: An environment variable by which all processes of one command are found.
MARK = "CHILDREN_TEST_MARK"
GONE_S = 30.0
#: They open a window on the machine for this long at least; each is ended long before.
LONG = {
    "soak": ["-m", "soak.run", "--minutes", "10"],
    "fuzz": ["-m", "fuzz.run", "--messages", "10000000", "--seed", "1"],
    "chaos": ["-m", "chaos.run", "--requests", "1000000", "--seed", "1"],
}


class Started:
    """A command with a temporary directory of its own."""

    def __init__(self, scratch: Path, *args: str) -> None:
        self.scratch = scratch / "tmp"
        self.scratch.mkdir()
        self.output = scratch / "output"
        self.mark = uuid.uuid4().hex
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TMPDIR": str(self.scratch),
            MARK: self.mark,
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                env=env,
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def children(self) -> set[int]:
        """Its processes that are alive, but for itself."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes()
                inside = (folder / "cwd").readlink().is_relative_to(self.scratch)
            except OSError:
                continue
            # Redis writes its title over its environment, but works in its data's directory.
            if inside or f"{MARK}={self.mark}".encode() in environ:
                found.add(int(folder.name))
        return found - {self.process.pid}

    def await_children(self, count: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return len(self.children()) >= count

        until(there, 90, f"{count} children")

    def end(self, number: signal.Signals) -> None:
        """Send it a signal; AssertionError if a child outlives it."""
        self.process.send_signal(number)
        self.process.wait(60)
        until(lambda: not self.children(), GONE_S, "its children have ended")


@contextmanager
def started(scratch: Path, *args: str) -> Iterator[Started]:
    command = Started(scratch, *args)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            end_child(command.process, 60)
        for pid in command.children():
            os.kill(pid, signal.SIGKILL)


def cli(*args: str) -> list[str]:
    return ["-m", "inferq.workers.cli", *args]


ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]


def named(number: signal.Signals) -> str:
    return number.name


@pytest.mark.parametrize("number", ENDS, ids=named)
def test_the_server_of_inferq_redis_ends_with_it(
    tmp_path: Path, redis_kind: str, number: signal.Signals
) -> None:
    port = free_port()
    args = cli("redis", "--port", str(port), "--redis", redis_kind)
    with started(tmp_path, *args) as command:
        until(lambda: "redis://" in command.output.read_text(), 30, "it says that it serves")
        with redis_py.Redis(port=port) as client:
            assert client.ping()
        assert f"redis://127.0.0.1:{port}/0" in command.output.read_text()
        assert len(command.children()) == 1
        command.end(number)
        once = Retry(NoBackoff(), 0)
        with (
            redis_py.Redis(port=port, retry=once) as client,
            pytest.raises(redis_py.ConnectionError),
        ):
            client.ping()
        if number is not signal.SIGKILL:
            assert list(command.scratch.iterdir()) == [], "nor is anything kept"


def test_a_port_that_is_taken_is_told(redis_url: str, redis_kind: str) -> None:
    port = redis_url.rpartition(":")[2].partition("/")[0]
    done = subprocess.run(
        [sys.executable, *cli("redis", "--port", port, "--redis", redis_kind)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "already in use" in done.stderr


def test_a_server_that_ends_ends_the_command(tmp_path: Path, redis_kind: str) -> None:
    args = cli("redis", "--port", str(free_port()), "--redis", redis_kind)
    with started(tmp_path, *args) as command:
        until(lambda: "redis://" in command.output.read_text(), 30, "it says that it serves")
        for pid in command.children():
            os.kill(pid, signal.SIGKILL)
        assert command.process.wait(30) == 1
        assert "the server ended" in command.output.read_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL], ids=named)
def test_all_that_the_demo_leaves_running_ends_with_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    with started(tmp_path, *cli("demo", "--stay", "--limit", "20")) as command:
        until(lambda: "until Ctrl-C" in command.output.read_text(), 120, "it stays")
        assert len(command.children()) >= 3, "Redis, the supervisor and its worker"
        command.end(number)
        if number is not signal.SIGKILL:
            assert list(command.scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=named)
def test_the_child_of_a_supervisor_ends_with_it(
    redis_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    fake_model(tmp_path / "models", "m", knobs="warm_up = false")
    args = cli("worker", "--models", str(tmp_path / "models"), "--redis-url", redis_url)
    with started(tmp_path, *args) as command:
        command.await_children(1)
        command.end(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=named)
def test_the_producers_of_a_bench_end_with_it(
    redis_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    fake_model(tmp_path / "models", "m", knobs="warm_up = false")
    with Worker(redis_url, tmp_path / "models"):
        args = cli("bench", "m", "--redis-url", redis_url, "--window", "60")
        with started(tmp_path, *args) as command:
            command.await_children(1)
            command.end(number)


@pytest.mark.parametrize("kind", LONG)
def test_what_a_long_run_of_tests_starts_ends_with_it(tmp_path: Path, kind: str) -> None:
    with started(tmp_path, *LONG[kind]) as command:
        command.await_children(2)
        command.end(signal.SIGKILL)
