"""One MULTI settles requests whole, and sending it again changes nothing (on a real Redis)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack
import pytest
from helpers.settlements import NAMES, RESULTS, I
from helpers.wait import until
from msgspec.structs import replace
from redis import Redis

from inferq.shared import codec
from inferq.shared.resp import Command, pack, unpack
from inferq.shared.schema import Ticket
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.oom import forced
from inferq.workers.claims.settlement import (
    DEAD_LETTERS_KEPT,
    DEAD_LETTERS_S,
    DEAD_PAYLOAD_S,
    KEYS_AT_ONCE,
    QUARANTINED_KEPT,
    QUARANTINED_LEFT,
    Settle,
    Settlement,
    without_scripts,
)
from inferq.workers.claims.verdicts import Quarantined
from inferq.workers.data_plane.results import MAX_QUARANTINED_BYTES, MAX_REASON_CHARS


def settled(claim: Claim, place: int, **given: Any) -> Settlement:
    request_id = f"id{place}"
    return Settlement(Slot(claim, place), "m", request_id, b"done", **given)


def commands(settlements: Iterable[Settlement]) -> list[Command]:
    return Settle.of(settlements, NAMES, I, 60).commands


def apply(redis: Redis, settlements: Iterable[Settlement], times: int = 1) -> None:
    settlements = list(settlements)
    for _ in range(times):
        with redis.pipeline(transaction=True) as pipe:
            for command in commands(settlements):
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            pipe.execute(raise_on_error=False)


def state(redis: Redis) -> dict[bytes, Any]:
    """All that Redis holds."""
    read = {b"string": redis.get, b"hash": redis.hgetall, b"set": redis.smembers}
    found: dict[bytes, Any] = {}
    for key in redis.keys("*"):
        assert isinstance(key, bytes)
        kind = redis.type(key)
        found[key] = redis.lrange(key, 0, -1) if kind == b"list" else read[kind](key)  # type: ignore[index]
    return found


def test_a_settled_request_is_blanked_in_its_claim_and_the_last_one_ends_it(
    redis: Redis, claim: Claim
) -> None:
    apply(redis, [settled(claim, 1)])
    assert redis.lrange(claim.key, 0, -1) == [b"third", b"", b"first"]
    assert not claim.complete
    apply(redis, [settled(claim, 0), settled(claim, 2)])
    assert claim.complete
    assert set(state(redis)) == {NAMES.meta(f"id{n}").encode() for n in range(3)}


def test_the_first_stored_result_stays_and_expires(redis: Redis, claim: Claim) -> None:
    redis.set(NAMES.meta("id0"), b"cancelled", ex=30)
    apply(redis, [settled(claim, 0), settled(claim, 1)])
    assert redis.get(NAMES.meta("id0")) == b"cancelled"
    assert redis.get(NAMES.meta("id1")) == b"done"
    assert 30 < redis.ttl(NAMES.meta("id1")) <= 60


def test_what_was_computing_its_attempts_and_its_payload_are_gone(
    redis: Redis, claim: Claim
) -> None:
    redis.sadd(NAMES.running(I), "m/id0", "m/id1")
    redis.hset(NAMES.attempts("m"), mapping={"id0": 1, "#hash": 2, "other": 1})
    redis.mset({"payload": 1, "payload2": 2, "kept": 3})
    keys = ("payload", "payload2")
    apply(
        redis,
        [settled(claim, 0, running=True, attempts=1, attempts_field="#hash", payload_keys=keys)],
    )
    assert redis.smembers(NAMES.running(I)) == {b"m/id1"}
    assert redis.hgetall(NAMES.attempts("m")) == {b"other": b"1"}
    assert redis.exists("payload", "payload2") == 0
    assert redis.exists("kept") == 1


def test_an_ignored_result_is_neither_stored_nor_told(redis: Redis, claim: Claim) -> None:
    given = settled(claim, 0, ignore_result=True, reply="channel")
    told = ("SET", "PUBLISH", "EVAL")
    assert not any(command[0] in told for command in commands([given]))
    apply(redis, [given])
    assert redis.lrange(claim.key, 0, -1) == [b"third", b"second", b""]


def test_each_client_hears_of_all_its_requests_at_once_and_each_channel_of_its_own(
    redis: Redis, claim: Claim
) -> None:
    with redis.pubsub() as heard:  # type: ignore[no-untyped-call]
        heard.psubscribe("*")
        heard.get_message(timeout=10)
        replies = ("a", "b", "a")
        apply(redis, [settled(claim, n, reply=reply) for n, reply in enumerate(replies)])
        messages = [heard.get_message(timeout=10) for _ in range(5)]
    got = [(each["channel"], each["data"]) for each in messages if each is not None]
    assert got[:3] == [(NAMES.meta(f"id{n}").encode(), b"done") for n in range(3)]
    assert {channel: msgpack.unpackb(ids) for channel, ids in got[3:]} == {
        b"a": ["id0", "id2"],
        b"b": ["id1"],
    }


def test_a_dead_letter_is_kept_with_its_payload(redis: Redis, claim: Claim) -> None:
    redis.set("payload", 1)
    apply(redis, [settled(claim, 0, dead_letter=b"letter", payload_keys=("payload",))])
    assert redis.lrange(NAMES.dead("m"), 0, -1) == [b"letter"]
    assert DEAD_PAYLOAD_S - 60 < redis.ttl("payload") <= DEAD_PAYLOAD_S


def test_only_so_many_dead_letters_are_kept(redis: Redis, claim: Claim) -> None:
    redis.lpush(NAMES.dead("m"), *(str(n) for n in range(DEAD_LETTERS_KEPT)))
    apply(redis, [settled(claim, 0, dead_letter=b"newest")])
    assert redis.llen(NAMES.dead("m")) == DEAD_LETTERS_KEPT
    assert redis.lindex(NAMES.dead("m"), 0) == b"newest"
    assert redis.lindex(NAMES.dead("m"), -1) == b"1"


@pytest.mark.parametrize("places", [[1], [0, 2], [0, 1, 2]])
def test_a_multi_whose_answer_was_lost_may_be_sent_again(
    redis: Redis, claim: Claim, places: list[int]
) -> None:
    redis.mset({f"payload{n}": n for n in range(3)})
    redis.sadd(NAMES.running(I), "m/id0", "m/id1", "m/id2")
    settlements = [
        settled(
            claim,
            n,
            running=True,
            attempts=1,
            payload_keys=(f"payload{n}",),
            dead_letter=f"letter{n}".encode() if n else None,
            before=(("HSET", "unacked", f"tag{n}", "message"),),
        )
        for n in places
    ]
    apply(redis, settlements)
    once = state(redis)
    apply(redis, settlements, times=2)
    assert state(redis) == once


# --- which reply decides which request ------------------------------------------------------------


def replies_of(redis: Redis, made: Settle) -> list[Any]:
    """What Redis answers to the commands of `made`, as the connections of ours read it."""
    with redis.pipeline(transaction=True) as pipe:
        for command in made.commands:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        return pipe.execute(raise_on_error=False)


def test_only_a_result_that_redis_refused_was_there_before(redis: Redis) -> None:
    claim = Claim("claim", "m", 0, 5)
    redis.mset({NAMES.meta(f"id{n}"): b"first" for n in (2, 3, 4)})
    made = Settle.of(
        [
            settled(claim, 0, reply="channel"),
            settled(claim, 1, ignore_result=True),
            settled(claim, 2, dead_letter=b"letter", payload_keys=("payload",)),
            settled(claim, 3, stored=True),
            settled(claim, 4),
        ],
        NAMES,
        I,
        60,
    )
    replies = replies_of(redis, made)
    assert made.overtaken(replies) == {2, 4}
    assert made.overtaken([0 if each is None else each for each in replies]) == set()


def test_a_hand_over_that_answers_nil_passes_for_no_refused_result(redis: Redis) -> None:
    claim = Claim("claim", "m", 0, 2)
    redis.set("lock", "another's")
    lock = (("SET", "lock", "mine", "NX"),)
    made = Settle.of([settled(claim, 0, before=lock), settled(claim, 1)], NAMES, I, 60)
    replies = replies_of(redis, made)
    assert None in replies
    assert made.overtaken(replies) == set()
    redis.delete("lock")
    assert made.overtaken(replies_of(redis, made)) == {0, 1}


def test_what_is_stored_and_told_is_apart_from_what_acknowledges(
    redis: Redis, claim: Claim
) -> None:
    """Sent again to a Redis that went back, it touches no claim and nothing of Celery's."""
    redis.set("payload", 1)
    state_before = state(redis)
    made = Settle.of(
        [
            settled(claim, 0, reply="channel", running=True, attempts=1),
            settled(claim, 1, dead_letter=b"letter", payload_keys=("payload",)),
            settled(claim, 2, before=(("RPUSH", "unacked", "message"),)),
        ],
        NAMES,
        I,
        60,
    )
    for command in made.storing:
        redis.execute_command(*command)  # type: ignore[no-untyped-call]
    after = state(redis)
    assert redis.ttl("payload") > 0
    new = {key: after.pop(key) for key in after.keys() - state_before.keys()}
    assert after == state_before
    assert set(new) == {
        key.encode()
        for key in (
            NAMES.dead("m"),
            NAMES.quarantined("m"),
            *(NAMES.meta(f"id{n}") for n in range(3)),
        )
    }


@pytest.mark.parametrize("size", [10, 100_000])
def test_who_waits_on_a_results_channel_is_told_of_it(
    redis: Redis, claim: Claim, size: int
) -> None:
    with redis.pubsub(ignore_subscribe_messages=True) as waiting:  # type: ignore[no-untyped-call]
        waiting.subscribe(NAMES.meta("id1"))
        until(lambda: redis.pubsub_numsub(NAMES.meta("id1"))[0][1] == 1)
        done = [replace(settled(claim, place), outcome=bytes([place]) * size) for place in (0, 1)]
        apply(redis, done)
        told = until(lambda: waiting.get_message(timeout=1))
        assert told["data"] == redis.get(NAMES.meta("id1")) == b"\1" * size


@pytest.mark.parametrize("full", [False, True], ids=["", "while Redis is full"])
@pytest.mark.parametrize("size", [10, 100_000])
def test_nobody_is_told_a_result_that_is_not_the_stored_one(
    redis: Redis, claim: Claim, size: int, full: bool
) -> None:
    redis.set(NAMES.meta("id0"), b"first")
    done = [replace(settled(claim, n), outcome=b"x" * size) for n in (0, 1)]
    with redis.pubsub(ignore_subscribe_messages=True) as waiting:  # type: ignore[no-untyped-call]
        waiting.subscribe(NAMES.meta("id0"), NAMES.meta("id1"))
        until(lambda: redis.pubsub_numsub(NAMES.meta("id1"))[0][1] == 1)
        if full:
            packed = pack(commands(done))
            replies = redis.execute_command(*forced(without_scripts(unpack(packed)), NAMES))  # type: ignore[no-untyped-call]
            assert not any(isinstance(reply, Exception) for reply in replies)
            assert len(replies) == packed.count, "each tells of its own command"
        else:
            apply(redis, done)
        told = [until(lambda: waiting.get_message(timeout=1)) for _ in done]
    assert {each["channel"]: each["data"] for each in told} == {
        NAMES.meta("id0").encode(): b"first",
        NAMES.meta("id1").encode(): b"x" * size,
    }


def test_a_key_of_another_type_keeps_nobody_else_from_being_told(
    redis: Redis, claim: Claim
) -> None:
    redis.lpush(NAMES.meta("id0"), "no result")
    with redis.pubsub(ignore_subscribe_messages=True) as waiting:  # type: ignore[no-untyped-call]
        waiting.subscribe(NAMES.meta("id0"), NAMES.meta("id1"))
        until(lambda: redis.pubsub_numsub(NAMES.meta("id1"))[0][1] == 1)
        apply(redis, [settled(claim, 0), settled(claim, 1)])
        assert until(lambda: waiting.get_message(timeout=1))["data"] == b"done"


def test_no_command_names_more_results_than_lua_can_take(redis: Redis, claim: Claim) -> None:
    many = [replace(settled(claim, 0), request_id=f"id{n}") for n in range(2 * KEYS_AT_ONCE + 1)]
    made = commands(many)
    assert max(len(command) for command in made) == KEYS_AT_ONCE + 3
    apply(redis, many)
    assert redis.exists(*(NAMES.meta(str(done.request_id)) for done in many)) == len(many)


def test_no_unlink_names_more_keys_than_lua_can_take(redis: Redis, claim: Claim) -> None:
    keys = tuple(f"payload{n}" for n in range(2 * KEYS_AT_ONCE + 1))
    redis.mset(dict.fromkeys(keys, "x"))
    made = commands([settled(claim, 0, payload_keys=keys)])
    assert max(len(command) for command in made) == KEYS_AT_ONCE + 1
    apply(redis, [settled(claim, 0, payload_keys=keys)])
    assert redis.exists(*keys) == 0


# --- dead letters are bounded, and garbage goes first ---------------------------------------------


def garbage(claim: Claim, n: int, size: int = 100) -> Settlement:
    raw = b"garbage %d " % n + b"x" * size
    return RESULTS.quarantined(Quarantined(Slot(claim, 0), raw, "why"), float(n))


def real(claim: Claim, n: int, size: int = 100) -> Settlement:
    ticket = Ticket(id=f"id{n}", model="m", content_type=codec.JSON, attempts=3)
    return RESULTS.dead(Slot(claim, 0), ticket, b"%d " % n + b"x" * size, float(n))


def letters(redis: Redis) -> list[tuple[bool, bytes]]:
    """Whether each is quarantined, and the first word of its message; newest first."""
    found = [msgpack.unpackb(raw) for raw in redis.lrange(NAMES.dead("m"), 0, -1)]
    return [(each.get("quarantined", False), each["message"].split()[0]) for each in found]


def taken(redis: Redis) -> int:
    return int(redis.memory_usage(NAMES.dead("m"), samples=0) or 0)


def apply_full(redis: Redis, settlements: Iterable[Settlement]) -> None:
    """As a worker does while Redis is full."""
    packed = pack(commands(list(settlements)))
    replies = redis.execute_command(*forced(without_scripts(unpack(packed)), NAMES))  # type: ignore[no-untyped-call]
    assert len(replies) == packed.count
    assert not [reply for reply in replies if isinstance(reply, Exception)]


@pytest.mark.parametrize("settle", [apply, apply_full], ids=["", "while Redis is full"])
def test_garbage_evicts_garbage_and_no_letter_of_an_accepted_request(
    redis: Redis, claim: Claim, settle: Any
) -> None:
    settle(redis, [real(claim, n) for n in range(5)])
    for start in range(0, 3 * QUARANTINED_KEPT, 100):
        settle(redis, [garbage(claim, n) for n in range(start, start + 100)])
        kept = letters(redis)
        assert [word for waste, word in kept if not waste] == [b"%d" % n for n in range(4, -1, -1)]
        assert sum(waste for waste, _ in kept) <= QUARANTINED_KEPT
    assert redis.lindex(NAMES.dead("m"), 0) == garbage(claim, start + 99).dead_letter
    assert sum(waste for waste, _ in kept) >= QUARANTINED_LEFT
    for start in range(5, DEAD_LETTERS_KEPT + 100, 500):
        settle(redis, [real(claim, n) for n in range(start, start + 500)])
    assert redis.llen(NAMES.dead("m")) == DEAD_LETTERS_KEPT


def test_dead_letters_take_no_more_bytes_than_they_may_and_garbage_goes_first(
    redis: Redis, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 2_000_000
    monkeypatch.setattr("inferq.workers.claims.settlement.DEAD_LETTERS_BYTES", most)
    apply(redis, [real(claim, n, 10_000) for n in range(20)])
    apply(redis, [garbage(claim, n, 50_000) for n in range(30)])
    assert len(letters(redis)) == 50
    apply(redis, [garbage(claim, 30, 50_000), garbage(claim, 31, 400_000)])
    apply(redis, [real(claim, n, 200_000) for n in range(20, 24)])
    kept = letters(redis)
    assert sum(not waste for waste, _ in kept) == 24
    assert 0 < sum(waste for waste, _ in kept) < 30
    assert taken(redis) <= most
    apply(redis, [real(claim, n, 300_000) for n in range(24, 40)])
    kept = letters(redis)
    assert kept[0] == (False, b"39")
    assert not any(waste for waste, _ in kept)
    assert taken(redis) <= most
    apply(redis, [real(claim, 40, 2 * most)])
    assert letters(redis)[0] == (False, b"40"), "the newest stays, however large"


def test_dead_letters_expire_and_so_does_what_is_counted_of_them(
    redis: Redis, claim: Claim
) -> None:
    apply(redis, [real(claim, 1), garbage(claim, 2)])
    for key in (NAMES.dead("m"), NAMES.quarantined("m")):
        assert DEAD_LETTERS_S - 60 < redis.ttl(key) <= DEAD_LETTERS_S


@pytest.mark.parametrize("odd", [b"no number", b"9" * 30, []], ids=["text", "too large", "a list"])
def test_an_odd_count_of_garbage_is_counted_anew(redis: Redis, claim: Claim, odd: Any) -> None:
    if isinstance(odd, bytes):
        redis.set(NAMES.quarantined("m"), odd)
    else:
        redis.lpush(NAMES.quarantined("m"), "x")
    apply(redis, [garbage(claim, n) for n in range(10)])
    assert redis.get(NAMES.quarantined("m")) == b"10"
    assert len(letters(redis)) == 10


def test_of_bytes_that_nobody_can_read_the_first_64_kb_are_kept(claim: Claim) -> None:
    raw = b"\xff" * (MAX_QUARANTINED_BYTES + 1)
    done = RESULTS.quarantined(Quarantined(Slot(claim, 0), raw, "w" * 10_000), 7.0)
    letter = msgpack.unpackb(done.dead_letter or b"")
    assert letter["message"] == raw[:MAX_QUARANTINED_BYTES]
    assert letter["size"] == len(raw)
    assert len(letter["reason"]) <= MAX_REASON_CHARS + 1
    whole = RESULTS.dead(Slot(claim, 0), Ticket("a", "m", codec.JSON), raw, 7.0)
    assert msgpack.unpackb(whole.dead_letter or b"")["message"] == raw


def test_garbage_that_holds_somebodys_id_answers_nobody_and_deletes_nothing(
    redis: Redis, claim: Claim
) -> None:
    key = NAMES.payload("victim", "x")
    redis.set(key, "payload")
    cut = b'{"headers": {"id": "victim", "inferq_reply": "channel"}, "body": "' + b"x" * 50
    done = RESULTS.quarantined(Quarantined(Slot(claim, 0), cut, "why"), 7.0)
    assert (done.request_id, done.reply, done.payload_keys) == (None, None, ())
    apply(redis, [done])
    assert not redis.exists(NAMES.meta("victim"))
    assert redis.get(key) == b"payload"
