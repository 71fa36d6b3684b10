"""Payloads are read straight into place, in whatever pieces they come."""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import redis as redis_py

from inferq.shared.replies import Replies
from inferq.workers.claims.payloads import _SLACK, PayloadReader, _InPlace

VALUES = [b"a" * 9_000, None, b"", b"0123456789" * 1_000, b"\r\n$3\r\n"]


def reply(values: Sequence[bytes | None]) -> bytes:
    parts = [b"_\r\n" if each is None else b"$%d\r\n%b\r\n" % (len(each), each) for each in values]
    return b"*%d\r\n" % len(values) + b"".join(parts)


def read(raw: bytes, size: int, limits: Sequence[int]) -> list[Any]:
    """What is made of `raw`, which comes in pieces of `size` bytes."""
    parser = _InPlace()
    ours, theirs = socket.socketpair()

    def write() -> None:
        for at in range(0, len(raw), size):
            theirs.sendall(raw[at : at + size])

    with ours, theirs:
        ours.settimeout(10)
        writer = threading.Thread(target=write)
        writer.start()
        parser.expect(limits)
        try:
            return Replies(parser).read(ours, len(limits))
        finally:
            writer.join(10)


@pytest.mark.parametrize("size", [1, 2, 3, 4_095, 4_097, 100_000])
def test_values_come_whole_in_whatever_pieces(size: int) -> None:
    found = read(reply(VALUES), size, [10_000] * len(VALUES))
    assert [None if each is None else bytes(each) for each in found] == VALUES


@pytest.mark.parametrize("size", [1, 5_000, 100_000])
def test_what_is_larger_than_its_limit_is_passed_over_and_its_neighbours_are_not(size: int) -> None:
    found = read(reply(VALUES), size, [8_999, 1, 0, 10_000, 5])
    assert [None if each is None else bytes(each) for each in found] == [
        None,
        None,
        b"",
        VALUES[3],
        None,
    ]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"-ERR no\r\n", "MGET of 1 payloads answered b'-ERR no'"),
        (b"*2\r\n", "MGET of 1 payloads answered"),
        (b"*1\r\n:7\r\n", "a payload was answered with b':7'"),
        (b"*1\r\n$" + b"1" * 5_000, "a reply line is too long"),
    ],
)
def test_an_answer_of_another_kind_is_told(raw: bytes, problem: str) -> None:
    with pytest.raises(redis_py.RedisError, match=problem):
        read(raw, 1_000, [10])


@pytest.fixture
def reader(redis_url: str) -> Iterator[PayloadReader]:
    with redis_py.Redis.from_url(redis_url, protocol=3) as client:
        reader = PayloadReader(client, 10.0)
        yield reader
        reader.close()


def test_a_reader_goes_on_after_a_broken_connection(
    redis: redis_py.Redis, reader: PayloadReader
) -> None:
    redis.mset({"a": b"x" * 300_000, "b": b"y"})
    sizes = {"a": 300_000, "b": 1, "gone": 5}
    wanted = {"a": b"x" * 300_000, "b": b"y", "gone": None}
    for _ in range(2):
        found = reader.fetch(sizes, 1 << 20)
        assert {key: each and bytes(each) for key, each in found.items()} == wanted
        redis.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises((OSError, redis_py.RedisError)):
            reader.fetch(sizes, 1 << 20)
    assert reader.fetch({"a": 300_000 - _SLACK - 1}, 1 << 20) == {"a": None}


def test_a_payload_that_was_handed_on_is_not_kept_in_memory(
    redis: redis_py.Redis, reader: PayloadReader
) -> None:
    redis.set("a", b"x" * 300_000)
    (value,) = reader.fetch({"a": 300_000}, 1 << 20).values()
    assert isinstance(value, memoryview)
    array = value.obj
    assert isinstance(array, np.ndarray)
    known = weakref.ref(array)
    del value, array
    assert known() is None
