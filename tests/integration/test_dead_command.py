"""``inferq dead``: what was given up is looked at, put back once its cause is gone, or dropped."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.repository import claim_checked, fake_model, message, numbered
from helpers.results import dead_letters, meta_of, outputs_of
from helpers.stock import let_go
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared import codec
from inferq.shared.celery_app import make_app
from inferq.shared.errors import DeadLettered, InferqError
from inferq.shared.names import Names
from inferq.shared.settings import Settings
from inferq.workers.claims.recovery import decoding_field
from inferq.workers.cli import inferq
from inferq.workers.data_plane.results import MAX_QUARANTINED_BYTES
from inferq.workers.engines.fake import FAULT_EXIT
from inferq.workers.queues import dead_letters as dead_letters_module
from inferq.workers.queues.dead_letters import DeadLetters

NAMES = Names()
#: Enough columns for a request to be claim-checked.
WIDE = 16_384
WAIT_S = 30.0

Dead = Callable[..., Result]


@pytest.fixture
def dead(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Dead:
    """``dead("list", "--json")`` runs the command; its input is no terminal."""
    monkeypatch.setenv("INFERQ_REDIS_URL", redis_url)
    return lambda *args: CliRunner().invoke(inferq, ["dead", *args])


def give_up(redis: Redis, raw: bytes, request_id: str | None, model: str = "m") -> bytes:
    """What a worker writes of a dead letter; returns its bytes."""
    letter: bytes = msgpack.packb(
        {
            "id": request_id, "reason": "its worker died computing it 3 times", "attempts": 3,
            "at_ms": 1.7e12, "worker": "cpu0@host", "message": raw,
        }
    )  # fmt: skip
    redis.lpush(NAMES.dead(model), letter)
    if request_id is not None:
        error = DeadLettered("its worker died computing it 3 times")
        meta = codec.encode_failure(request_id, error, datetime.now(UTC).isoformat())
        redis.set(NAMES.meta(request_id), meta, ex=600, nx=True)
    return letter


def give_up_requests(redis: Redis, count: int) -> None:
    for n in range(count):
        request_id, raw = message("m", numbered(n))
        give_up(redis, raw, request_id)


def waiting(redis: Redis, step: int = 0, model: str = "m") -> list[Any]:
    found: list[Any] = redis.lrange(NAMES.queue(model, step), 0, -1)
    return found


def test_a_poison_is_put_back_once_its_cause_is_gone_and_who_waits_gets_its_result(
    redis_url: str, redis: Redis, tmp_path: Path, dead: Dead
) -> None:
    knobs = "lanes = 1\nwarm_up = false"
    fake_model(tmp_path / "faulty", "wide", knobs=knobs, fake="faults = true", width=WIDE)
    fake_model(tmp_path / "mended", "wide", knobs=knobs, fake="faults = false", width=WIDE)
    x = np.full((1, WIDE), FAULT_EXIT, np.float32)
    env = {"INFERQ_LEASE_S": "0.5"}
    app = make_app(Settings.load(redis_url=redis_url))
    app.conf.result_serializer = "msgpack"
    with Client(redis_url) as client:
        with Worker(redis_url, tmp_path / "faulty", env=env) as worker:
            pending = client.submit("wide", {"x": x}, priority=6)
            assert worker.process.wait(WAIT_S)
        for _ in range(2):
            with Worker(redis_url, tmp_path / "faulty", env=env) as worker:
                assert worker.process.wait(WAIT_S)
        with Worker(redis_url, tmp_path / "faulty", env=env), pytest.raises(DeadLettered):
            pending.result(WAIT_S)
    request_id = pending.request_id
    key = NAMES.payload(request_id, "x")

    (row,) = json.loads(dead("list", "--json").stdout)
    assert (row["model"], row["id"], row["attempts"]) == ("wide", request_id, 3)
    (shown,) = json.loads(dead("show", request_id, "--json").stdout)
    assert shown["payloads"] == {"x": {"key": key, "bytes": x.nbytes}}
    assert shown["args"] == "{'model': 'wide', x=<1x16384 float32>}"
    assert (shown["queue"], shown["stored_result"]) == (NAMES.queue("wide", 6), "FAILURE")
    assert shown["headers"]["id"] == request_id

    run = dead("replay", request_id)
    assert (run.exit_code, run.stderr) == (0, "")
    assert run.stdout == f"replayed {request_id} to inferq.wide, priority 6\n"
    assert redis.exists(NAMES.meta(request_id), NAMES.dead("wide"), NAMES.attempts("wide")) == 0
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(app.AsyncResult(request_id).get, timeout=WAIT_S)
        with Worker(redis_url, tmp_path / "mended", env=env):
            np.testing.assert_array_equal(codec.decode_outputs(waits.result(WAIT_S))["x"], x)
            until(lambda: not redis.exists(key), what="the payload is done with")
    let_go(app)
    assert dead("replay", request_id).exit_code == 1, "it is replayed once"


def test_bytes_that_are_no_request_are_quarantined_again_and_what_came_too_late_is_served(
    redis_url: str, redis: Redis, tmp_path: Path, dead: Dead
) -> None:
    fake_model(tmp_path / "models", "m")
    late_id, late = message("m", numbered(7), deadline_ms=1.0)
    expired = datetime.now(UTC) - timedelta(hours=1)
    late = late.replace(b'"expires": null', f'"expires": "{expired.isoformat()}"'.encode())
    assert b'"expires": null' not in late
    give_up(redis, late, late_id)
    with Worker(redis_url, tmp_path / "models"):
        redis.lpush(NAMES.queue("m"), b"\x1b[2Jjunk")
        until(lambda: redis.llen(NAMES.dead("m")) == 2, what="it is quarantined")
        before = dead_letters(redis, "m")[0]
        name = decoding_field(b"\x1b[2Jjunk")[:13]
        assert [row["id"] for row in json.loads(dead("list", "m", "--json").stdout)] == [
            name,
            late_id,
        ]
        (shown,) = json.loads(dead("show", name, "--json").stdout)
        assert shown["first_bytes"] == "\x1b[2Jjunk"
        assert shown["unreadable"] == shown["reason"]
        assert "\x1b" not in dead("show", name).stdout
        run = dead("replay", name, late_id)
        assert (run.exit_code, run.stderr) == (0, "")
        assert f"{late_id} to inferq.m, priority 0; dropped its passed inferq_deadline_ms and " in (
            run.stdout
        )
        np.testing.assert_array_equal(outputs_of(redis, late_id)["x"], numbered(7))
        until(lambda: redis.llen(NAMES.dead("m")) == 1, what="it is quarantined again")
        (after,) = dead_letters(redis, "m")
        assert after["message"] == b"\x1b[2Jjunk"
        assert after["at_ms"] > before["at_ms"]


def test_a_replayed_request_is_as_it_was_but_for_what_would_end_it_at_once(
    redis: Redis, dead: Dead
) -> None:
    seconds, _ = redis.time()
    ahead_id, ahead = message("m", numbered(1), priority=4, deadline_ms=(seconds + 900) * 1000.0)
    late_id, late = message("m", numbered(2), priority=4, deadline_ms=1.0)
    for request_id, raw in ((late_id, late), (ahead_id, ahead)):
        give_up(redis, raw, request_id)
    redis.lpush(NAMES.queue("m", 3), b"waits already")
    redis.hset(NAMES.attempts("m"), mapping={ahead_id: 3, decoding_field(late): 3, "another": 1})
    assert dead("replay", "--all", "--model", "m", "--yes").exit_code == 0
    newest, second, first = waiting(redis, 3)
    assert (newest, first) == (ahead, b"waits already")
    was, now = json.loads(late), json.loads(second)
    assert now["headers"].pop("inferq_deadline_ms") is None
    assert was["headers"].pop("inferq_deadline_ms") == 1.0
    assert (now, list(now)) == (was, list(was))
    assert redis.hgetall(NAMES.attempts("m")) == {b"another": b"1"}
    assert redis.keys(NAMES.meta("*")) == []


def test_a_request_whose_payload_is_gone_is_refused_and_the_others_are_not(
    redis: Redis, dead: Dead
) -> None:
    gone, kept, answered = (claim_checked(redis, "m", numbered(n)) for n in range(3))
    for request_id, raw, _ in (gone, kept, answered):
        give_up(redis, raw, request_id)
    redis.delete(gone[2])
    success = codec.encode_meta("SUCCESS", answered[0], {}, "", codec.JSON, None, None)
    redis.set(NAMES.meta(answered[0]), success)
    run = dead("replay", gone[0], answered[0], "no-such-id", kept[0])
    assert run.exit_code == 1
    assert f"Error: {gone[0]}: input 'x': its payload '{gone[2]}' is gone\n" in run.stderr
    assert f"Error: {answered[0]}: its stored result is SUCCESS by now" in run.stderr
    assert "Error: no dead letter 'no-such-id'\n" in run.stderr
    assert waiting(redis) == [kept[1]]
    assert redis.ttl(kept[2]) > 24 * 3600
    assert {letter["id"] for letter in dead_letters(redis, "m")} == {gone[0], answered[0]}
    assert redis.exists(NAMES.meta(gone[0]), NAMES.meta(answered[0])) == 2


def test_bytes_of_which_only_the_first_were_kept_are_not_sent_once_more(
    redis_url: str, redis: Redis, tmp_path: Path, dead: Dead
) -> None:
    fake_model(tmp_path / "models", "m")
    size = 2 * MAX_QUARANTINED_BYTES
    with Worker(redis_url, tmp_path / "models"):
        redis.lpush(NAMES.queue("m"), b"x" * size)
        until(lambda: redis.llen(NAMES.dead("m")) == 1, what="it is quarantined")
    (row,) = json.loads(dead("list", "m", "--json").stdout)
    assert row["message_bytes"] == size
    refused = dead("replay", row["id"])
    assert refused.exit_code == 1
    told = f"{MAX_QUARANTINED_BYTES} of its {size} bytes are kept; it can only be dropped"
    assert told in refused.stderr
    (shown,) = json.loads(dead("show", row["id"], "--json").stdout)
    assert shown["unreadable"] == shown["reason"]
    assert dead("drop", row["id"]).exit_code == 0
    assert not redis.exists(NAMES.dead("m"))


def test_drop_deletes_letters_and_payloads_and_leaves_the_results(redis: Redis, dead: Dead) -> None:
    one, two = (claim_checked(redis, "m", numbered(n)) for n in range(2))
    for request_id, raw, _ in (one, two):
        give_up(redis, raw, request_id)
    redis.lpush(NAMES.dead("m"), b"no letter")
    assert dead("drop", one[0], "--model", "other").exit_code == 1
    assert dead("drop", one[0]).stdout == f"dropped {one[0]} of m\n"
    assert redis.exists(one[2]) == 0
    assert redis.exists(two[2]) == 1
    (row, _) = json.loads(dead("list", "--json").stdout)
    assert row["reason"].startswith("not a dead letter")
    refused = dead("replay", row["id"])
    assert (refused.exit_code, "it can only be dropped" in refused.stderr) == (1, True)
    assert dead("drop", "--all", "--model", "m", "--yes").exit_code == 0
    assert redis.exists(NAMES.dead("m"), two[2]) == 0
    assert meta_of(redis, two[0])["status"] == "FAILURE"
    assert waiting(redis) == []


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["replay"], "expected IDs or --all"),
        (["drop", "a", "--all", "--model", "m"], "expected IDs or --all"),
        (["drop", "--all"], "expected --model"),
        (["drop", "--all", "--model", "m"], "expected --yes"),
        (["list", ":"], "':'; expected a model's name"),
        (["show", "a", "--model", "m"], "no dead letter 'a' of m"),
        (["list", "--redis-url", "redis://127.0.0.1:1/0"], "Redis does not answer"),
        (["list", "--redis-url", "http://x"], "expected one of redis://"),
    ],
)
def test_a_command_that_cannot_be_followed_says_what_is_expected(
    redis: Redis, dead: Dead, args: list[str], error: str
) -> None:
    give_up_requests(redis, 1)
    run = dead(*args)
    assert run.exit_code != 0
    assert error in run.stderr
    assert redis.llen(NAMES.dead("m")) == 1


def test_a_list_is_columns_and_what_others_wrote_does_not_steer_the_terminal(
    redis: Redis, dead: Dead
) -> None:
    assert dead("list").stderr == "no dead letters\n"
    give_up(redis, b"x" * 2_000, "i\x1b[31m", "one")
    give_up(redis, message("two", numbered(1), "second")[1], "second", model="two")
    redis.lpush(NAMES.dead("no model"), b"x")
    heading, first, second = dead("list").stdout.splitlines()
    assert heading.split() == ["model", "id", "reason", "attempts", "age", "worker", "size"]
    assert first.startswith("one    i\\x1b[31m  its worker died computing it 3 times  3 ")
    assert first.endswith("cpu0@host  2.0 KB")
    assert second.startswith("two    second ")


def _in_terminal(
    redis_url: str, *args: str, stdin: int | None = None, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "dead", *args],
        env={**os.environ, "INFERQ_REDIS_URL": redis_url, "PYTHONPATH": path, "COLUMNS": "160"},
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )


def test_a_terminal_is_shown_a_table(redis_url: str, redis: Redis) -> None:
    give_up(redis, b"x", "i\x1b[31m[bold]")
    ours, theirs = pty.openpty()
    done = _in_terminal(redis_url, "list", stdout=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert "│ i\\x1b[31m[bold] │" in shown.decode()
    assert b"died computing it 3 times" in shown


def test_only_keys_of_the_prefix_are_looked_at(redis: Redis) -> None:
    ours, other = Names(prefix="a[b]*:"), Names(prefix="ab:")
    redis.lpush(ours.dead("m"), b"x")
    redis.lpush(other.dead("n"), b"x")
    assert DeadLetters(redis, ours).models() == ["m"]
    assert DeadLetters(redis, NAMES).models() == []


@pytest.mark.parametrize(("answer", "left"), [("n", 2), ("y", 0)])
def test_all_are_dropped_only_if_the_terminal_says_so(
    redis_url: str, redis: Redis, answer: str, left: int
) -> None:
    give_up_requests(redis, 2)
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = _in_terminal(redis_url, "drop", "--all", "--model", "m", stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert "drop 2 dead letters of m? [y/N]" in done.stdout + done.stderr
    assert done.returncode == (1 if left else 0), done.stderr
    assert redis.llen(NAMES.dead("m")) == left


def test_operators_and_workers_at_once_replay_each_letter_once(
    redis_url: str, redis: Redis
) -> None:
    sent = dict(message("m", numbered(n)) for n in range(150))
    for request_id, raw in sent.items():
        give_up(redis, raw, request_id)
    operators = 3
    start = threading.Barrier(operators + 1)
    ended = threading.Event()

    def replay_all() -> int:
        with Redis.from_url(redis_url) as client:
            letters = DeadLetters(client, NAMES)
            digests = {letter.digest for letter in letters.read("m") if letter.id in sent}
            assert len(digests) == len(sent)
            start.wait(WAIT_S)
            replayed = 0
            for letter in letters.pick("m", digests):
                with contextlib.suppress(InferqError):
                    letters.replay(letter)
                    replayed += 1
            return replayed

    def add_letters() -> int:
        added = 0
        with Redis.from_url(redis_url) as client:
            start.wait(WAIT_S)
            while not ended.is_set():
                added += 1
                give_up(client, b"%d" % added, None)
        return added

    with ThreadPoolExecutor(operators + 1) as pool:
        adding = pool.submit(add_letters)
        replaying = [pool.submit(replay_all) for _ in range(operators)]
        try:
            counts = [future.result(WAIT_S) for future in replaying]
        finally:
            ended.set()
        added = adding.result(WAIT_S)
    assert sum(counts) == len(sent)
    assert sorted(waiting(redis)) == sorted(sent.values())
    assert redis.llen(NAMES.dead("m")) == added > 0


def test_letters_are_read_in_blocks_of_a_bounded_size(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters_module, "BLOCK_BYTES", 10_000)
    raws = [give_up(redis, b"%d " % n * (1000 if n % 50 == 0 else 1), None) for n in range(300)]
    redis.config_resetstat()
    letters = DeadLetters(redis, NAMES)
    assert [letter.raw for letter in letters.read("m")] == raws[::-1]
    stats: Any = redis.info("commandstats")
    assert stats["cmdstat_lrange"]["calls"] > 300 / dead_letters_module.BLOCK_LETTERS
    wanted = {letter.digest for letter in letters.read("m")}
    for place, letter in enumerate(letters.pick("m", wanted)):
        assert letter.raw == raws[place], "the oldest first"
        if place % 3:
            letters.drop(letter)
    assert redis.lrange(NAMES.dead("m"), 0, -1) == raws[::3][::-1]
