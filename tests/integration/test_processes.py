"""`inferq worker --processes N`: several worker processes share one device, and each is itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.gpus import NO_CARD
from helpers.metrics import free_ports, scrape
from helpers.repository import fake_model, numbered, push
from helpers.results import expect, nothing_is_held
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.names import Names
from inferq.workers.metrics.published import read_stats
from inferq.workers.supervision.health import SERVING, Beat, read_beat

NAMES = Names()
#: What makes a worker find two GPUs that are none.
TWO_GPUS = {
    "PYTHONPATH": os.pathsep.join([str(NO_CARD), *(entry for entry in sys.path if entry)]),
    "FAKE_GPUS": "2",
}


class _Several(Worker):
    """``inferq worker`` with `args`; `pid` is the supervisor's."""

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "inferq.workers.cli", "worker"]
        return [*command, "--models", str(self.models), *self._args]


class _Running:
    """A supervisor, and what it says of its worker processes, by node name without the host."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        self._folder = folder

    def beats(self) -> dict[str, Beat]:
        found = [read_beat(path) for path in self._folder.glob("*.json")]
        return {beat.node.partition("@")[0]: beat for beat in found if beat is not None}

    def serving(self, count: int = 2) -> dict[str, int]:
        """The pids of `count` processes, by name, once all of them serve."""

        def all_serve() -> dict[str, int]:
            beats = self.beats()
            serve = all(beat.state == SERVING for beat in beats.values())
            pids = {name: beat.pid for name, beat in beats.items()}
            return pids if serve and len(pids) == count else {}

        return until(all_serve, 60, f"{count} processes serve")


@pytest.fixture
def heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers that run here have their heartbeats."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder / "inferq"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    few = "lanes = 1\nmax_batch_size = 4\nwarm_up = false"
    fake_model(root, "m", knobs=few, fake="delay_ms = 5")
    fake_model(root, "slow", knobs=few, fake="delay_ms = 1500")
    return root


@pytest.fixture
def two(redis_url: str, models: Path, heartbeats: Path) -> Iterator[_Running]:
    """``inferq worker --cpu --processes 2``, once both serve."""
    args = ["--cpu", "--processes", "2", "-n", "w%p@%h"]
    with _Several(redis_url, models, args=args) as worker:
        running = _Running(worker, heartbeats)
        running.serving()
        yield running


def _inferq(*args: str, redis_url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", *args],
        env={**os.environ, "INFERQ_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_two_processes_serve_one_queue_and_each_is_told_of(
    redis_url: str, redis: Redis, models: Path, heartbeats: Path
) -> None:
    port = free_ports(2)
    args = ["--cpu", "--processes", "2", "--metrics", f"127.0.0.1:{port}"]
    with _Several(redis_url, models, ["m"], args=args) as worker, Client(redis_url) as client:
        pids = _Running(worker, heartbeats).serving()
        names = [f"cpu{worker.pid}-1", f"cpu{worker.pid}-2"]
        assert sorted(pids) == names
        items = ({"x": numbered(n)} for n in range(400))
        computed_by = set()
        for n, result in enumerate(client.map("m", items, in_flight=64)):
            np.testing.assert_array_equal(result.outputs["x"], numbered(n))
            assert result.receipt is not None
            computed_by.add(result.receipt.worker.partition("@")[0])
        assert sorted(computed_by) == names
        # What Flower's pages and `inferq queues` are made from.
        stats = until(lambda: told if len(told := read_stats(redis, NAMES)) == 2 else None) or []
        assert [each.node.partition("@")[0] for each in stats] == names
        told_at = [scrape(f"http://127.0.0.1:{port + n}/metrics") for n in range(2)]
        computed = [each("inferq_batch_rows_sum", model="m") for each in told_at]
        assert min(computed) > 0
        assert sum(computed) == 400
        health = _inferq("health", "--json", redis_url=redis_url)
        told = {each["node"].partition("@")[0]: each for each in json.loads(health.stdout)}
        assert health.returncode == 0
        assert {name: each["pid"] for name, each in told.items()} == pids
        doctor = _inferq("doctor", redis_url=redis_url).stdout
        assert all(re.search(rf"worker {name}@\S+ +serving", doctor) for name in names), doctor
        assert "2 worker processes share this host's cores" in worker.log


def test_a_process_that_is_killed_under_load_loses_nothing_and_is_replaced_alone(
    redis: Redis, two: _Running
) -> None:
    before = two.serving()
    sent = push(redis, "m", range(600))
    first, other = sorted(before)
    until(lambda: redis.llen(NAMES.queue("m")) < 500, what="both are at work")
    os.kill(before[first], signal.SIGKILL)
    expect(redis, sent, 60)
    until(partial(nothing_is_held, redis), what="nothing is held")
    after = until(lambda: now if (now := two.serving())[first] != before[first] else None) or {}
    assert after[other] == before[other]
    assert two.worker.log.count("ended by SIGKILL") == 1
    assert two.worker.log.count("the next one starts in") == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_a_signal_ends_all_processes_and_loses_nothing(
    redis_url: str, redis: Redis, models: Path, two: _Running, stop: signal.Signals
) -> None:
    pids = two.serving()
    sent = push(redis, "slow", range(40))
    until(lambda: len(redis.keys(NAMES.running("*"))) == 2, what="both compute")
    two.worker.process.send_signal(stop)
    assert two.worker.process.wait(30) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    done = [request_id for request_id in sent if redis.exists(NAMES.meta(request_id))]
    assert done, "what computed was finished"
    assert nothing_is_held(redis)
    assert redis.llen(NAMES.queue("slow")) == len(sent) - len(done)
    with Worker(redis_url, models, ["slow"], name="next"):
        expect(redis, sent, 60)


def test_sigquit_reaches_all_processes_and_hands_everything_back(
    redis: Redis, two: _Running
) -> None:
    pids = two.serving()
    sent = push(redis, "slow", range(40))
    until(lambda: len(redis.keys(NAMES.running("*"))) == 2, what="both compute")
    two.worker.process.send_signal(signal.SIGQUIT)
    two.worker.process.wait(30)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert nothing_is_held(redis)
    left = {request_id for request_id in sent if not redis.exists(NAMES.meta(request_id))}
    assert redis.llen(NAMES.queue("slow")) == len(left)


def test_processes_of_two_gpus_are_pinned_to_theirs_and_named_after_it(
    redis_url: str, models: Path, heartbeats: Path
) -> None:
    args = ["--gpu", "0,1", "--processes", "2"]
    mps = {"CUDA_MPS_PIPE_DIRECTORY": str(heartbeats.parent)}
    with _Several(redis_url, models, ["m"], env={**TWO_GPUS, **mps}, args=args) as worker:
        pids = _Running(worker, heartbeats).serving(4)
        assert sorted(pids) == ["gpu0-1", "gpu0-2", "gpu1-1", "gpu1-2"]
        for name, pid in pids.items():
            lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            assert f"INFERQ_GPU={name[3]}" in lines
            assert "INFERQ_PROCESSES=2" in lines
        assert (
            "2 worker processes share each GPU, and its memory; MPS is noticed "
            f"(CUDA_MPS_PIPE_DIRECTORY is {heartbeats.parent})"
        ) in worker.log
        assert worker.stop() == 0
