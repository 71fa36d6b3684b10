"""The hand-driven connection: what is packed, and what happens when it breaks."""

from __future__ import annotations

import socket
import threading

import hiredis
import pytest
import redis

from inferq.producer.wire import Wire
from inferq.producer.wires import Wires
from inferq.shared.connect import redis_client
from inferq.shared.errors import RedisUnavailable
from inferq.shared.resp import Command, pack

LARGE = bytes(range(256)) * 1000


@pytest.mark.parametrize(
    "commands",
    [
        [("PING",)],
        [("SET", "k", LARGE, "EX", 60)],
        [("MULTI",), ("SET", "kä", LARGE, "EX", 60), ("LPUSH", "q", b"m", LARGE), ("EXEC",)],
        [("SET", "k", LARGE)] * 3 + [("ZADD", "z", 1.5, "m")],
    ],
)
def test_large_arguments_are_packed_as_hiredis_packs_them_but_not_copied(
    commands: list[Command],
) -> None:
    pieces = pack(commands).pieces
    assert b"".join(pieces) == b"".join(hiredis.pack_command(one) for one in commands)
    assert sum(piece is LARGE for piece in pieces) == sum(one.count(LARGE) for one in commands)


def test_megabytes_go_out_and_come_back_whole(redis_url: str) -> None:
    wires = Wires(redis_client(redis_url))
    values = [bytes([n]) * 3_000_000 for n in range(5)]
    stored = wires.call([("SET", f"k{n}", value) for n, value in enumerate(values)])
    assert stored == [b"OK"] * 5
    assert wires.call([("MGET", *[f"k{n}" for n in range(5)])]) == [values]
    wires.close()


def test_an_error_stands_where_its_reply_would_stand(redis_url: str) -> None:
    wires = Wires(redis_client(redis_url))
    first, error, last = wires.call([("SET", "k", 1), ("LPUSH", "k", 1), ("GET", "k")])
    assert (first, last) == (b"OK", b"1")
    assert "WRONGTYPE" in str(error)
    wires.close()


def test_pushes_that_arrive_between_replies_are_set_aside(
    redis: redis.Redis, redis_url: str
) -> None:
    heard: list[bytes] = []
    wire = Wire(redis_client(redis_url), lambda push: heard.append(push[-1]))
    wire.open()
    wire.send([("SUBSCRIBE", "channel")])
    assert wire.call([("PING",)]) == [b"PONG"]
    redis.publish("channel", b"one")
    assert wire.call([("PING",)]) == [b"PONG"]
    redis.publish("channel", b"two")
    wire.listen(10)
    assert heard[1:] == [b"one", b"two"]
    wire.close()


def test_an_interrupted_wait_ends_at_once(redis_url: str) -> None:
    wire = Wire(redis_client(redis_url))
    wire.open()
    timer = threading.Timer(0.05, wire.interrupt)
    timer.start()
    with pytest.raises(redis.ConnectionError):
        wire.listen(60)
    timer.join()
    wire.close()


def test_a_closed_port_is_unavailable_and_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(RedisUnavailable, match=str(port)):
        Wires(redis_client(f"redis://127.0.0.1:{port}")).call([("PING",)])
