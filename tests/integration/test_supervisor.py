"""`inferq worker` keeps its worker process alive, and what that held does not wait for a lease."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.repository import fake_model, message, numbered, push
from helpers.results import dead_letters, expect, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client, Pending
from inferq.shared.errors import DeadLettered
from inferq.shared.names import Names
from inferq.workers.engines.fake import FAULT_EXIT, FAULT_FATAL, FAULT_HANG, FAULT_SEGFAULT
from inferq.workers.supervision import supervisor
from inferq.workers.supervision.health import EX_FATAL_ENGINE
from inferq.workers.supervision.supervisor import Child, Supervisor

NAMES = Names()
#: While Redis is silent: the supervisor waits for it twice, 2 s each.
STOPS_WITHIN_S = 8.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    few = "lanes = 1\nmax_batch_size = 8\nwarm_up = false"
    fake_model(root, "m", knobs=few, fake="faults = true\ndelay_ms = 5")
    fake_model(root, "slow", knobs=few, fake="delay_ms = 3000")
    fake_model(root, "hangs", knobs=f"{few}\nmax_run_seconds = 1.0", fake="faults = true")
    return root


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_what_a_killed_child_held_is_back_within_a_second_and_a_new_child_serves(
    redis_url: str, redis: Redis, models: Path
) -> None:
    with SupervisedWorker(redis_url, models, ["slow"]) as worker:
        sent = dict(message("slow", numbered(n)) for n in range(4))
        redis.lpush(NAMES.queue("slow"), *sent.values())
        until(lambda: redis.keys(NAMES.running("*")), what="they compute")
        first = worker.child()
        until(lambda: " serves, " in worker.log, what="the supervisor knows it")
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        until(partial(nothing_is_held, redis), what="nothing is held")
        assert time.monotonic() - killed <= 1.0, "the promise"
        assert redis.llen(NAMES.queue("slow")) == 4
        for n, request_id in enumerate(sent):
            np.testing.assert_array_equal(outputs_of(redis, request_id, 30)["x"], numbered(n))
        assert worker.child() != first
        assert "ended by SIGKILL" in worker.log
        until(lambda: worker.log.count(" serves, ") == 2, what="the time to consuming is told")
        assert worker.stop() == 0
    assert redis.zcard(NAMES.leases) == 0


def test_one_segfault_among_200_requests_is_one_dead_letter_and_199_results(
    redis_url: str, redis: Redis, models: Path
) -> None:
    with SupervisedWorker(redis_url, models, ["m"]), Client(redis_url) as client:
        pending = [
            client.submit("m", {"x": numbered(FAULT_SEGFAULT if n == 77 else n)})
            for n in range(200)
        ]
        for n, each in enumerate(pending):
            if n != 77:
                np.testing.assert_array_equal(each.result(60).outputs["x"], numbered(n))
        with pytest.raises(DeadLettered, match="died computing it 3 times"):
            pending[77].result(60)
        (letter,) = dead_letters(redis, "m")
        assert letter["id"] == pending[77].request_id


def test_a_copy_of_a_poison_ends_with_it(redis_url: str, redis: Redis, models: Path) -> None:
    """As a client makes one that pushes again what is unresolved, once Redis was restarted."""
    request_id, raw = message("m", numbered(FAULT_SEGFAULT))
    with SupervisedWorker(redis_url, models, ["m"]) as worker:
        redis.lpush(NAMES.queue("m"), raw, raw)
        assert meta_of(redis, request_id, 60)["result"]["exc_type"] == "DeadLettered"
        until(lambda: not redis.llen(NAMES.queue("m")), 60, "both are claimed")
        until(partial(nothing_is_held, redis), 60, "both are settled")
        assert [letter["id"] for letter in dead_letters(redis, "m")] == [request_id]
        assert worker.log.count("ended by SIGSEGV") <= 4


def test_an_engine_beyond_use_is_replaced_by_a_fresh_process(
    redis_url: str, redis: Redis, models: Path
) -> None:
    with SupervisedWorker(redis_url, models, ["m"]) as worker, Client(redis_url) as client:
        first = worker.child()
        bad = client.submit("m", {"x": numbered(FAULT_FATAL)})
        until(partial(_ended, first), 30, "the first child's end")
        assert client.infer("m", {"x": numbered(7)}, timeout=30).outputs["x"][0, 0] == 7
        with pytest.raises(DeadLettered):
            bad.result(60)
        assert worker.log.count(f"ended with status {EX_FATAL_ENGINE}") == 3
        assert worker.child() != first


def test_a_child_that_never_gets_on_with_its_batch_is_replaced(
    redis_url: str, models: Path
) -> None:
    with SupervisedWorker(redis_url, models, ["hangs"]) as worker, Client(redis_url) as client:
        bad = client.submit("hangs", {"x": numbered(FAULT_HANG)})
        good = [client.submit("hangs", {"x": numbered(n)}) for n in range(10)]
        for n, each in enumerate(good):
            np.testing.assert_array_equal(each.result(60).outputs["x"], numbered(n))
        with pytest.raises(DeadLettered):
            bad.result(60)
        assert "is killed: a batch computes for longer than max_run_seconds" in worker.log


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_first_signal_finishes_what_computes(
    redis_url: str, redis: Redis, models: Path, stop: signal.Signals
) -> None:
    with SupervisedWorker(redis_url, models, ["slow"]) as worker:
        request_id, raw = message("slow", numbered(1))
        redis.lpush(NAMES.queue("slow"), raw)
        until(lambda: redis.keys(NAMES.running("*")), what="it computes")
        worker.process.send_signal(stop)
        assert worker.process.wait(30) == 0
    assert meta_of(redis, request_id, 0.1)["status"] == "SUCCESS"


def test_a_second_signal_hands_back_at_once(redis_url: str, redis: Redis, models: Path) -> None:
    with SupervisedWorker(redis_url, models, ["slow"]) as worker:
        request_id, raw = message("slow", numbered(1))
        redis.lpush(NAMES.queue("slow"), raw)
        until(lambda: redis.keys(NAMES.running("*")), what="it computes")
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: "Warm shutdown" in worker.log, what="the first signal is passed on")
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(30)
        assert "SIGQUIT to the workers" in worker.log
    assert not redis.exists(NAMES.meta(request_id))
    assert redis.lrange(NAMES.queue("slow"), 0, -1) == [raw]


@pytest.mark.parametrize("answers", [True, False], ids=["Redis answers late", "Redis is silent"])
def test_a_signal_while_a_dead_childs_requests_are_put_back_stops_it_and_loses_none(
    redis_url: str, redis: Redis, models: Path, answers: bool
) -> None:
    with SupervisedWorker(redis_url, models, ["slow"], env={"INFERQ_LEASE_S": "1"}) as worker:
        sent = push(redis, "slow", range(2))
        until(lambda: redis.keys(NAMES.running("*")), what="they compute")
        until(lambda: " serves, " in worker.log, what="the supervisor knows its child")
        child = worker.child()
        worker.pause()
        os.kill(child, signal.SIGKILL)
        before = {client["id"] for client in redis.client_list()}
        redis.client_pause(60_000, all=False)
        try:
            worker.resume()
            until(partial(_waits_with_a_script, redis, before), what="it puts them back")
            worker.process.send_signal(signal.SIGTERM)
            if answers:
                redis.client_unpause()
            assert worker.process.wait(STOPS_WITHIN_S) == 0
        finally:
            redis.client_unpause()
        assert _ended(child)
        assert "SIGTERM to the workers" in worker.log
        assert "ended by SIGTERM" not in worker.log, "no other child was started"
    if answers:
        assert nothing_is_held(redis)
        assert redis.zcard(NAMES.leases) == 0
        assert redis.llen(NAMES.queue("slow")) == 2
    with Worker(redis_url, models, ["slow"], name="next", env={"INFERQ_LEASE_S": "1"}):
        expect(redis, sent, 30)
        until(partial(nothing_is_held, redis), what="nothing is held")


def _waits_with_a_script(redis: Redis, before: set[str]) -> bool:
    """Whether a client that came after those `before` waits for the reply to a script."""
    newcomers = [client for client in redis.client_list() if client["id"] not in before]
    return any("b" in each["flags"] and each["cmd"] == "evalsha" for each in newcomers)


def test_a_worker_that_cannot_serve_ends_its_supervisor_with_its_status(
    redis_url: str, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", fake="delay_ms = -1")
    worker = Worker(redis_url, tmp_path, ["m"])
    supervised = SupervisedWorker(redis_url, tmp_path, ["m"])
    try:
        for each in (worker, supervised):
            each.start()
        assert supervised.process.wait(30) == worker.process.wait(30) != 0
        assert "fake.delay_ms" in supervised.log
    finally:
        worker.close()
        supervised.close()


def test_rolling_restart_under_load_fails_no_request(
    redis_url: str, redis: Redis, models: Path
) -> None:
    pending: list[Pending] = []
    with Client(redis_url) as client:
        workers = [SupervisedWorker(redis_url, models, ["m"], name=f"w{n}") for n in range(2)]
        try:
            for worker in workers:
                worker.start()
                worker.wait_ready()
            for n, old in enumerate(workers):
                goal = len(pending) + 500
                fresh = SupervisedWorker(redis_url, models, ["m"], name=f"fresh{n}")
                fresh.start()
                workers[n] = fresh
                old.process.send_signal(signal.SIGTERM)
                while len(pending) < goal or old.alive:
                    pending.append(client.submit("m", {"x": numbered(len(pending))}))
                    if len(pending) % 50 == 0:
                        pending[-1].result(60)
                assert old.process.returncode == 0
                old.close()
                fresh.wait_ready()
            for n, each in enumerate(pending):
                np.testing.assert_array_equal(each.result(60).outputs["x"], numbered(n))
        finally:
            for worker in workers:
                worker.close()
    until(partial(nothing_is_held, redis), what="nothing is held")


#: A child that says that it serves, and then dies.
_DIES = """
import json, os, sys, time
beat = dict(pid=os.getpid(), node="n", state="serving", written=time.monotonic(), answered=1.0,
            computing=0, waiting=0, overdue=False, stuck_s=0.0)
with open(sys.argv[1] + ".new", "w") as file:
    json.dump(beat, file)
os.replace(sys.argv[1] + ".new", sys.argv[1])
with open(sys.argv[2], "a") as file:
    file.write(f"{time.monotonic()}\\n")
time.sleep(0.6)  # longer than LOOK_S: the supervisor has seen it serve
starts = len(open(sys.argv[2]).readlines())
os._exit(0 if starts >= 5 else 9)
"""


def test_one_that_keeps_dying_is_replaced_more_and_more_slowly(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.2)
    starts = tmp_path / "starts"
    beat = tmp_path / "beat"
    command = [sys.executable, "-c", _DIES, str(beat), str(starts)]
    assert Supervisor([Child("n", command, os.environ, beat)], redis, NAMES).run() == 0
    at = [float(line) for line in starts.read_text().split()]
    pauses = [later - earlier for earlier, later in pairwise(at)]
    assert len(pauses) == 4
    for pause, least in zip(pauses, [0.0, 0.2, 0.4, 0.8], strict=True):
        assert pause >= 0.6 + least


#: A child that says once that it serves, and then nothing; told apart from its successor by pid.
_FALLS_SILENT = (
    _DIES.replace("time.sleep(0.6)", "time.sleep(60 if starts == 1 else 0.6)")
    .replace("starts = len(open(sys.argv[2]).readlines())\n", "")
    .replace("time.sleep(60", "starts = len(open(sys.argv[2]).readlines())\ntime.sleep(60")
)


def test_one_that_falls_silent_is_replaced(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine may hold the interpreter's lock: no thread of it can say that it is stuck."""
    monkeypatch.setattr(supervisor, "SILENT_S", 2.0)
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.01)
    starts, beat = tmp_path / "starts", tmp_path / "beat"
    command = [sys.executable, "-c", _FALLS_SILENT, str(beat), str(starts)]
    began = time.monotonic()
    assert Supervisor([Child("n", command, os.environ, beat)], redis, NAMES).run() == 0
    assert time.monotonic() - began < 60
    assert len(starts.read_text().split()) == 5


def test_poison_that_is_the_first_thing_served_does_not_end_the_supervisor(
    redis_url: str, redis: Redis, models: Path
) -> None:
    poison, raw = message("m", numbered(FAULT_EXIT))
    good = dict(message("m", numbered(n)) for n in range(3))
    redis.lpush(NAMES.queue("m"), raw, *good.values())
    with SupervisedWorker(redis_url, models, ["m"]):
        for n, request_id in enumerate(good):
            np.testing.assert_array_equal(outputs_of(redis, request_id, 60)["x"], numbered(n))
        assert meta_of(redis, poison, 60)["result"]["exc_type"] == "DeadLettered"


def test_one_that_never_served_and_ends_with_a_status_is_not_tried_again(
    redis: Redis, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "raise SystemExit(78)"]
    child = Child("n", command, os.environ, tmp_path / "beat")
    assert Supervisor([child], redis, NAMES).run() == 78
