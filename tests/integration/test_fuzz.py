"""A worker lives through messages that are broken in every way; `make fuzz` sends many more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import redis as redis_py
from fuzz.footprint import SLACK_BYTES, lasting, pattern_of
from fuzz.innocents import LOST, Answer, percentile_ms
from fuzz.mutations import HOSTILE, Messages
from fuzz.run import ENOUGH, LIMIT_MB, MAX_GROWTH_MB, MAX_SLOWER, Sums, campaign, read_id
from helpers.envelopes import request

MESSAGES = 3_000


def test_whatever_is_pushed_the_worker_lives_and_every_message_is_accounted_for(
    redis_kind: str,
) -> None:
    sums = campaign(MESSAGES, seed=7, kind=redis_kind)
    assert sums.passed, (str(sums), sums.left, sums.lasting, sums.culprits[:5])
    assert sums.sent == sum(sums.ends.values()) == MESSAGES
    assert sums.good > MESSAGES / 5
    # They are broken in many ways: none of these ends is rare.
    for end in ("dead letter", "InvalidInput", "NotRegistered", "SUCCESS"):
        assert sums.ends[end] > 5, sums.ends


def test_a_run_judges_every_figure() -> None:
    good = Sums(
        sent=10, alone=ENOUGH, alone_p99_ms=10.0, beside=ENOUGH, beside_p99_ms=10 * MAX_SLOWER
    )
    assert good.passed
    breaches = (
        {"deaths": 1}, {"unanswered": 1}, {"wrong": 1}, {"left": ["a key"]}, {"beside": 0},
        {"lasting": ["keys"]}, {"innocent": Counter({LOST: 1})}, {"peak_mb": float(LIMIT_MB)},
        {"innocent": Counter({"EngineError": 1})}, {"rss_growth_mb": MAX_GROWTH_MB + 1},
        {"beside_p99_ms": 10 * MAX_SLOWER + 1},
    )  # fmt: skip
    for breach in breaches:
        assert not replace(good, **breach).passed, breach
    assert replace(good, alone=ENOUGH - 1, beside_p99_ms=1e6).passed, "it was chance"


def test_what_99_of_100_took_is_told() -> None:
    answers = [Answer(0.0, float(n), "answered") for n in range(100, 0, -1)]
    assert percentile_ms(answers, 0.99) == 100.0
    assert percentile_ms(answers, 0.5) == 51.0
    assert percentile_ms([], 0.99) == 0.0


def test_keys_without_a_ttl_that_came_or_grew_are_told_by_pattern(redis: redis_py.Redis) -> None:
    redis.mset({"a:1": "x", "b": "x"})
    redis.set("c:1", "x", ex=600)
    before = lasting(redis)
    assert lasting(redis).growth_since(before) == []
    redis.mset({"a:2": "x", "a:77": "x", f"new:{'0af3' * 8}": "x"})
    redis.set("c:2", "x", ex=600)
    redis.append("b", "x" * 2 * SLACK_BYTES)
    assert [line.split()[3:6] for line in lasting(redis).growth_since(before)] == [
        ["a:*", "by", "2"],
        ["b", "by", "0"],
        ["new:*", "by", "1"],
    ]
    redis.flushall()
    assert lasting(redis).growth_since(before) == []
    assert pattern_of("inferq:1:claim:" + "ab" * 20 + ":17:m:0") == "inferq:*:claim:*:*:m:*"


def test_a_seed_gives_the_same_messages_again() -> None:
    streams = [Messages(seed) for seed in (1, 1, 2)]
    first, again, other = ([stream.next().raw for _ in range(500)] for stream in streams)
    assert first == again
    assert first != other


def test_every_kind_of_harm_is_among_the_messages() -> None:
    stream = Messages(7)
    assert {stream.next().kind for _ in range(MESSAGES)} == {"good", "broken", *HOSTILE}


def test_a_message_names_an_id_if_a_lenient_reader_finds_one() -> None:
    raw = request(1, request_id="a")
    assert read_id(raw) == ("a", True, False)
    assert read_id(raw.replace(b"inferq.infer", b"other")) == ("a", False, False)
    assert read_id(raw.replace(b'"task":', b'"ignore_result": true, "task":')) == ("a", True, True)
    assert read_id(raw.replace(b'"id": "a"', b'"id": "\xff"')) == ("\ufffd", True, False)
    for broken in (b"", raw[:-1], raw.replace(b'"id": "a"', b'"id": ""'), b"[" * 100_000):
        assert read_id(broken) == (None, True, False)
