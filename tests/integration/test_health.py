"""`inferq health` fails for a worker that has work and does not get on with it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree

import msgspec
import pytest
from helpers.repository import fake_model, message, numbered
from helpers.served import served_model
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.engines.fake import FAULT_HANG
from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.supervision import health
from inferq.workers.supervision.health import (
    SERVING,
    STALE_S,
    STUCK_S,
    Beat,
    forget_the_dead,
    problem_of,
    read_beat,
    silence_s,
)
from inferq.workers.supervision.heartbeat import Heartbeat

NAMES = Names()
SOMEBODY = 4242


def ask(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inferq.workers.cli", "health", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def beat(**given: object) -> Beat:
    now = time.monotonic()
    good = Beat(os.getpid(), "node", SERVING, now, now, 0, 0, False, 0.0)
    return msgspec.structs.replace(good, **given)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(
        root, "m", knobs="lanes = 1\nwarm_up = false\nmax_run_seconds = 1.0", fake="faults = true"
    )
    return root


@pytest.fixture
def heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers that run here have their heartbeats by default."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"inferq-{os.geteuid()}"


def test_a_worker_is_healthy_until_its_batch_never_ends(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "beats" / "beat.json"
    with Worker(redis_url, models, env={"INFERQ_HEARTBEAT_FILE": str(path)}) as worker:
        until(lambda: ask("--file", str(path)).returncode == 0, what="it is healthy")
        (told,) = json.loads(ask("--file", str(path), "--json").stdout)
        assert (told["healthy"], told["pid"], told["state"]) == (True, worker.pid, "serving")
        redis.lpush(NAMES.queue("m"), message("m", numbered(FAULT_HANG))[1])
        until(lambda: ask("--file", str(path)).returncode == 1, what="it is not any more")
        answer = ask("--file", str(path))
        assert "a batch computes for longer than max_run_seconds" in answer.stdout
        worker.kill()
        assert f"its process {worker.pid} is gone" in ask("--file", str(path)).stdout


def test_a_worker_that_stops_leaves_no_heartbeat(
    redis_url: str, models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "beat.json"
    with Worker(redis_url, models, env={"INFERQ_HEARTBEAT_FILE": str(path)}) as worker:
        until(lambda: read_beat(path), what="a heartbeat")
        assert worker.stop() == 0
    assert list(tmp_path.glob("*beat*")) == []
    assert ask("--file", str(path)).returncode == 1


def test_a_heartbeat_that_cannot_be_written_is_refused(
    redis_url: str, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "beat.json"
    worker = Worker(redis_url, models, env={"INFERQ_HEARTBEAT_FILE": str(path)})
    try:
        worker.start()
        assert worker.process.wait(30) != 0
        assert f"INFERQ_HEARTBEAT_FILE is {str(path)!r}; expected a file" in worker.log
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"state": "loading"}, "it is loading"),
        ({"state": "stopping"}, "it is stopping"),
        ({"written": time.monotonic() - STALE_S - 5}, "no heartbeat for"),
        ({"overdue": True}, "longer than max_run_seconds"),
        ({"stuck_s": STUCK_S + 1, "waiting": 3}, "no progress for 31 s"),
        ({"stuck_s": STUCK_S - 1, "waiting": 3}, None),
    ],
    ids=["well", "loading", "stopping", "silent", "overdue", "stuck", "slow"],
)
def test_each_way_not_to_consume_is_named(given: dict[str, object], reason: str | None) -> None:
    problem = problem_of(beat(**given))
    assert problem is None if reason is None else reason in str(problem)


def test_silence_of_redis_is_the_workers_fault_only_if_redis_answers(
    new_redis: Callable[..., EmbeddedRedis], tmp_path: Path
) -> None:
    server = new_redis()
    deaf = beat(answered=time.monotonic() - health.UNHEARD_S - 1, written=time.monotonic() + 60)
    assert silence_s(deaf) is not None
    assert silence_s(beat()) is None
    path = tmp_path / "beat.json"
    path.write_bytes(msgspec.json.encode(deaf))
    answer = ask("--file", str(path), "--redis-url", server.url)
    assert (answer.returncode, "which answers" in answer.stdout) == (1, True)
    loading = beat(state="loading", answered=0.0, written=time.monotonic() + 60)
    (tmp_path / "loads").write_bytes(msgspec.json.encode(loading))
    assert ask("--file", str(tmp_path / "loads"), "--redis-url", server.url).returncode == 1
    server.kill()
    for each in (path, tmp_path / "loads"):
        answer = ask("--file", str(each), "--redis-url", server.url)
        assert (answer.returncode, "waits for Redis" in answer.stdout) == (0, True)
    gone = msgspec.structs.replace(loading, pid=2**22)
    path.write_bytes(msgspec.json.encode(gone))
    assert ask("--file", str(path), "--redis-url", server.url).returncode == 1


def test_what_was_killed_with_its_supervisor_is_forgotten_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "gone.json").write_bytes(msgspec.json.encode(beat(pid=2**22)))
    (tmp_path / "lives.json").write_bytes(msgspec.json.encode(beat()))
    forget_the_dead(tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["lives.json"]


class StandIn:
    """A data plane as far as a heartbeat looks at it."""

    def __init__(self) -> None:
        self.silent = False
        self.answering_since = 0.0
        self.models: Sequence[ServedModel] = ()
        self.steps = 0
        self.run_id = ""
        self.waits = False

    @property
    def answered_at(self) -> float:
        return 1.0 if self.silent else time.monotonic()

    def backlog(self) -> bool:
        return self.waits


def test_work_without_progress_is_counted_from_the_last_progress(tmp_path: Path) -> None:
    plane = StandIn()
    heart = Heartbeat(tmp_path / "beat.json", "node", tuple)
    heart.plane = plane
    assert heart._beat().stuck_s == 0
    plane.waits = True
    until(lambda: heart._beat().stuck_s > 0.05, what="work without progress")
    plane.steps += 1
    assert heart._beat().stuck_s == 0
    until(lambda: heart._beat().stuck_s > 0.05, what="stuck again")
    plane.silent = True
    assert heart._beat().stuck_s == 0, "without Redis nobody gets on"
    plane.silent = False
    until(lambda: heart._beat().stuck_s > 0.05, what="stuck once more")
    plane.waits = False
    assert heart._beat().stuck_s == 0


def test_an_audit_that_takes_its_time_is_no_lack_of_progress(tmp_path: Path, models: Path) -> None:
    plane = StandIn()
    plane.waits = True
    model = served_model(models, "m")
    plane.models = (model,)
    heart = Heartbeat(tmp_path / "beat.json", "node", tuple)
    heart.plane = plane
    until(lambda: heart._beat().stuck_s > 0.05, what="work without progress")
    model.audit.since = time.monotonic()
    beat = heart._beat()
    assert (beat.stuck_s, beat.computing, beat.overdue) == (0, 0, False)
    model.audit.since -= model.spec.config.max_run_seconds + 1
    assert heart._beat().overdue
    model.close(10)


class Waiting:
    """A canvas whose links have waited for so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def waits_s(self) -> float:
        return self.seconds


def test_links_that_wait_are_held_against_a_worker_only_while_redis_answers(
    tmp_path: Path,
) -> None:
    plane = StandIn()
    heart = Heartbeat(tmp_path / "beat.json", "node", tuple)
    heart.plane, heart.links = plane, Waiting(STUCK_S + 1)
    assert "links of a request have waited" in str(problem_of(heart._beat()))
    plane.silent = True
    assert heart._beat().links_s == 0
    plane.silent, plane.answering_since = False, time.monotonic()
    assert heart._beat().links_s < 1, "it came back just now"


def test_loops_that_fail_for_two_beats_are_told(tmp_path: Path) -> None:
    """A process that was stopped, and goes on, is not blamed for it."""

    class Ailing:
        name = "later"
        said: str | None = "has ended"

        def problem(self) -> str | None:
            return self.said

    heart, loop = Heartbeat(tmp_path / "beat.json", "node", lambda: [loop]), Ailing()
    heart.plane = StandIn()
    assert heart._beat().loops == {}
    assert problem_of(heart._beat()) == "its background loop later has ended"
    loop.said = None
    assert heart._beat().loops == {}
    loop.said = "has ended"
    assert heart._beat().loops == {}


def test_a_stopped_process_has_no_fresh_heartbeat(
    redis_url: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "STALE_S", 2.0)
    path = tmp_path / "beat.json"
    with Worker(redis_url, models, env={"INFERQ_HEARTBEAT_FILE": str(path)}) as worker:
        until(lambda: read_beat(path), what="a heartbeat")
        os.kill(worker.pid, signal.SIGSTOP)

        def reason() -> str:
            found = read_beat(path)
            return (problem_of(found) or "") if found else ""

        until(lambda: "no heartbeat for" in reason(), what="it is noticed")


# --- the folder of heartbeats --------------------------------------------------------------------


@contextmanager
def _supervised(redis_url: str, models: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``inferq worker``, whose heartbeats are where they are by default."""
    command = [sys.executable, "-m", "inferq.workers.cli", "worker", "--models", str(models)]
    with log.open("wb") as output:
        environment = {**os.environ, "INFERQ_REDIS_URL": redis_url}
        process = start_child(command, output, env=environment)
    try:
        yield process
    finally:
        end_child(process, 40)


def _linked(folder: Path, planted: Path) -> None:
    folder.symlink_to(planted)


def _opened(folder: Path, planted: Path) -> None:
    planted.rename(folder)
    folder.chmod(0o777)


def _given_away(folder: Path, planted: Path) -> None:
    planted.rename(folder)
    os.chown(folder, SOMEBODY, SOMEBODY)


TAKEN = [
    pytest.param(_linked, id="a link"),
    pytest.param(_opened, id="open to all"),
    pytest.param(
        _given_away,
        id="somebody else's",
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others"),
    ),
]


@pytest.mark.parametrize("take", TAKEN)
def test_a_worker_does_not_start_where_somebody_else_has_made_its_folder(
    redis_url: str, models: Path, heartbeats: Path, take: Callable[[Path, Path], None]
) -> None:
    planted = heartbeats.parent / "planted"
    planted.mkdir(mode=0o700)
    take(heartbeats, planted)
    log = heartbeats.parent / "log"
    with _supervised(redis_url, models, log) as process:
        assert process.wait(30) == 1
    said = log.read_text().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"Error: {heartbeats} ")
    answer = ask("--redis-url", redis_url)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"Error: {heartbeats} ")


@pytest.mark.parametrize("take", TAKEN)
def test_a_worker_is_not_killed_by_heartbeats_that_somebody_else_has_put_there(
    redis_url: str,
    redis: Redis,
    models: Path,
    heartbeats: Path,
    take: Callable[[Path, Path], None],
) -> None:
    log = heartbeats.parent / "log"
    with _supervised(redis_url, models, log):

        def serving() -> tuple[Path, Beat] | None:
            for path in heartbeats.glob("*.json"):
                beat = read_beat(path)
                if beat is not None and beat.state == SERVING:
                    return path, beat
            return None

        until(lambda: " serves, " in log.read_text(), 60, "the supervisor knows its child")
        found = until(serving, what="a heartbeat")
        assert found is not None
        path, beat = found
        assert stat.S_IMODE(heartbeats.lstat().st_mode) == 0o700
        forged = msgspec.json.encode(msgspec.structs.replace(beat, overdue=True))
        planted = heartbeats.parent / "planted"
        planted.mkdir(mode=0o700)
        heartbeats.rename(heartbeats.parent / "aside")
        (planted / path.name).write_bytes(forged)
        take(heartbeats, planted)

        def told() -> bool:
            (heartbeats / path.name).write_bytes(forged)  # the worker itself may write there, too
            said = log.read_text()
            both = " is not watched: " in said and f"no heartbeat: {heartbeats} " in said
            return "is killed" in said or both

        until(told, 30, "both say that they do not use it")
        (heartbeats.unlink if heartbeats.is_symlink() else partial(rmtree, heartbeats))()
        (heartbeats.parent / "aside").rename(heartbeats)
        (heartbeats / path.name).unlink()
        again = until(serving, 30, "its heartbeat is there again")
        assert again is not None
        assert again[1].pid == beat.pid
    assert log.read_text().count(f" is not watched: {heartbeats} ") < 5, "not at each look"
    assert "Traceback" not in log.read_text()
    assert "is killed" not in log.read_text()


def test_workers_are_found_in_xdg_runtime_dir_and_where_it_is_not_set(
    redis_url: str, redis: Redis, models: Path, heartbeats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = heartbeats.parent / "run"
    run.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
    with _supervised(redis_url, models, heartbeats.parent / "log"):
        until(lambda: list((run / "inferq").glob("*.json")), 60, "it is told there")
        until(lambda: ask("--redis-url", redis_url).returncode == 0, what="it is healthy")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    with _supervised(redis_url, models, heartbeats.parent / "log"):
        until(lambda: list(heartbeats.glob("*.json")), 60, "it is told there")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
        until(lambda: ask("--redis-url", redis_url).returncode == 0, what="it is healthy")
