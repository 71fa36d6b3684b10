"""A worker lives through messages that are broken in every way; `make fuzz` sends many more."""

from __future__ import annotations

from fuzz.mutations import HOSTILE, Messages
from fuzz.run import campaign, read_id
from helpers.envelopes import request

MESSAGES = 3_000


def test_whatever_is_pushed_the_worker_lives_and_every_message_is_accounted_for(
    redis_kind: str,
) -> None:
    sums = campaign(MESSAGES, seed=7, kind=redis_kind)
    assert sums.passed, (str(sums), sums.left, sums.culprits[:5])
    assert sums.sent == sum(sums.ends.values()) == MESSAGES
    assert sums.good > MESSAGES / 5
    # They are broken in many ways: none of these ends is rare.
    for end in ("dead letter", "InvalidInput", "EngineError", "another task", "SUCCESS"):
        assert sums.ends[end] > 5, sums.ends


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
