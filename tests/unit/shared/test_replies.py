"""The one read loop: whatever pieces the bytes come in, each reply and each push has its place."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from inferq.shared.replies import GeneralParser, Replies
from inferq.shared.resp import ReplyError

#: Two pushes among five replies, the second of which is an error.
BYTES = (
    b"+OK\r\n>2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nq\r\n-ERR no\r\n$3\r\none\r\n:7\r\n"
    b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$3\r\ntwo\r\n_\r\n"
)
PUSHES = [[b"invalidate", [b"q"]], [b"message", b"c", b"two"]]


class Side:
    """One end, which reads, of a connection; what is written to the other."""

    def __init__(self) -> None:
        self.sock, self.other = socket.socketpair()
        limit = struct.pack("ll", 0, 200_000)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.pushes: list[Any] = []
        self.passed_over: list[Any] = []
        self.replies = Replies(GeneralParser(), self.pushes.append, self.passed_over.append)

    def read(self, count: int) -> list[Any]:
        return self.replies.read(self.sock, count)


@pytest.fixture
def side() -> Iterator[Side]:
    side = Side()
    with side.sock, side.other:
        yield side


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_replies_come_in_order_and_pushes_apart_in_whatever_pieces(side: Side, size: int) -> None:
    def write() -> None:
        for at in range(0, len(BYTES), size):
            side.other.sendall(BYTES[at : at + size])

    writer = threading.Thread(target=write)
    writer.start()
    first, error, *rest = side.read(5)
    writer.join(10)
    assert (first, rest) == (b"OK", [b"one", 7, None])
    assert isinstance(error, ReplyError)
    assert side.pushes == PUSHES


def test_what_is_asked_for_is_read_and_no_more_until_it_is_asked_for(side: Side) -> None:
    side.other.sendall(BYTES)
    assert side.read(1) == [b"OK"]
    assert side.pushes == [], "it comes behind that reply"
    assert len(side.read(3)) == 3
    assert side.pushes == PUSHES[:1]
    assert side.read(1) == [None]
    assert side.read(0) == []


def test_a_reply_that_is_passed_over_is_nobodys_wherever_it_is_met(side: Side) -> None:
    side.replies.pass_over(2)
    side.other.sendall(BYTES)
    assert side.read(2) == [b"one", 7]
    assert side.passed_over[0] == b"OK"
    assert isinstance(side.passed_over[1], ReplyError)
    side.replies.pass_over(1)
    side.replies.drain()
    assert side.passed_over[2:] == [None]
    assert side.pushes == PUSHES
    side.other.sendall(b"+next\r\n")
    assert side.read(1) == [b"next"], "none was counted twice"


def test_what_a_readable_socket_holds_is_taken_in_and_noted_at_once(side: Side) -> None:
    side.other.sendall(b">2\r\n$1\r\na\r\n$1\r\nb\r\n>2\r\n$1\r\nc\r\n")
    side.replies.receive(side.sock)
    assert side.pushes == [[b"a", b"b"]]
    side.other.sendall(b"$1\r\nd\r\n")
    side.replies.receive(side.sock)
    assert side.pushes == [[b"a", b"b"], [b"c", b"d"]]


def test_silence_and_an_end_break_a_read_and_silence_is_no_news(side: Side) -> None:
    side.other.sendall(b"+half")
    with pytest.raises(TimeoutError, match="did not answer in time"):
        side.read(1)
    side.replies.receive(side.sock)
    assert side.pushes == side.passed_over == []
    side.other.close()
    with pytest.raises(redis.ConnectionError, match="closed the connection"):
        side.read(1)
