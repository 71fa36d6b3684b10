"""A worker that has too little memory serves what fits, and does not try twice what killed it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis as redis_py
from helpers import onnx_models
from helpers.capped import CappedWorker, capped
from helpers.repository import fake_model, message, push
from helpers.results import expect, meta_of
from helpers.wait import until
from helpers.worker import SupervisedWorker
from shows.memory import capped_memory

from inferq.shared.names import Names
from inferq.workers.warmup.notes import Note, Size

NAMES = Names()
SIDE = 128


def _notes() -> list[Note]:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "inferq" / "warm-up"
    found = []
    for path in folder.glob("*.trying"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Note))
        except (OSError, msgspec.DecodeError):
            continue
    return found


def _trying(rows: int = 2) -> tuple[int, Size] | None:
    """The process that tries a size of at least `rows`, and that size."""
    for note in _notes():
        if note.trying is not None and note.trying.rows >= rows:
            return note.pid, note.trying
    return None


def test_a_model_that_takes_more_than_there_is_serves_what_fits_and_says_why() -> None:
    found = capped_memory()
    assert found["kills"] == 0
    assert found["wrong"] == 0
    assert found["ready_s"] < 60
    assert re.search(
        r"model wide: batches of at most (\d+) rows, in place of 32, since .* MB more, and .* MB of"
        r" .* are left; in model.toml, max_batch_size = \1 says so",
        found["said"],
    )


def test_after_a_kill_while_it_loads_the_next_child_stays_below_the_size(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    fake_model(tmp_path / "models", "m", fake="delay_ms = 700")
    with_log = SupervisedWorker(redis_url, tmp_path / "models", ["m"])
    try:
        with_log.start()
        pid, size = until(_trying, 30, "a size is tried") or (0, Size(0, 0))
        os.kill(pid, signal.SIGKILL)
        with_log.wait_ready()
        assert f"in place of 32, since {size.rows} were the last that a process ran" in with_log.log
        assert "max_batch_size = " in with_log.log
        sent = push(redis, "m", range(32))
        expect(redis, sent, 60)
        most = max(meta_of(redis, each)["receipt"]["batch_size"] for each in sent)
        assert most < size.rows
        assert with_log.stop() == 0
    finally:
        with_log.close()
    with SupervisedWorker(redis_url, tmp_path / "models", ["m"]) as worker:
        assert "in place of 32" not in worker.log, "one end that nothing explains is no proof"


def test_a_child_that_is_told_to_end_while_it_loads_blames_no_size(
    redis_url: str, tmp_path: Path
) -> None:
    fake_model(tmp_path / "models", "m", fake="delay_ms = 700")
    worker = SupervisedWorker(redis_url, tmp_path / "models", ["m"])
    try:
        worker.start()
        until(_trying, 30, "a size is tried")
        worker.stop()
    finally:
        worker.close()
    assert _notes() == []
    with SupervisedWorker(redis_url, tmp_path / "models", ["m"]) as another:
        assert "in place of" not in another.log


def test_after_a_kill_by_a_burst_the_next_child_stays_below_the_size(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    knobs = "warm_up = false\nlanes = 1"
    fake_model(tmp_path / "models", "m", knobs=knobs, fake="delay_ms = 1500")
    with SupervisedWorker(redis_url, tmp_path / "models", ["m"]) as worker:
        first = push(redis, "m", range(20))
        # The first batch may be of the few that have come when the worker looks: not that one.
        pid, size = until(lambda: _trying(8), 60, "a size is tried") or (0, Size(0, 0))
        os.kill(pid, signal.SIGKILL)
        until(lambda: "in place of 32, since " in worker.log, 30, "the next child says so")
        second = push(redis, "m", range(100, 132))
        expect(redis, second, 120)
        sizes = [meta_of(redis, each)["receipt"]["batch_size"] for each in second]
        assert 1 < max(sizes) < size.rows
        expect(redis, first, 120)


def test_bursts_that_the_kernel_kills_end_once_a_size_is_found_that_fits(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    """Without any warm-up: nothing was tried before requests come."""
    folder = tmp_path / "models" / "wide"
    onnx_models.wide_convolution(folder / "1" / "model.onnx", channels=512, side=SIDE)
    (folder / "model.toml").write_text("warm_up = false\nlanes = 2\nmax_attempts = 20\n")
    with capped(500) as cap:
        if cap.folder is None:
            pytest.skip("no cgroup can be made here, and without one the kernel kills nobody")
        worker = CappedWorker(cap, redis_url, tmp_path / "models", ["wide"])
        try:
            worker.start()
            worker.wait_ready()
            calm = _bursts(redis, worker)
            log = worker.log
        finally:
            worker.close()
        assert calm, "no burst went by without a kill"
        assert 1 <= cap.kills() <= 5
    assert "ended by SIGKILL, by the kernel for want of memory (500 MiB of the cgroup" in log
    assert "the kernel, for want of memory, killed it" in log
    caps = [int(n) for n in re.findall(r"batches of at most (\d+) rows, in place of 32", log)]
    assert caps == sorted(caps, reverse=True)


def _bursts(redis: redis_py.Redis, worker: Any) -> bool:
    """Bursts of 48 until two in a row kill nobody."""
    calm = 0
    for _ in range(8):
        before = worker.log.count("ended by SIGKILL")
        sent = []
        for n in range(48):
            row = np.full((1, 3, SIDE, SIDE), float(n), np.float32)
            request_id, raw = message("wide", row)
            sent.append(request_id)
            redis.lpush(NAMES.queue("wide"), raw)
        for request_id in sent:
            assert meta_of(redis, request_id, 120)["status"] == "SUCCESS"
        calm = calm + 1 if worker.log.count("ended by SIGKILL") == before else 0
        if calm == 2:
            return True
    return False
