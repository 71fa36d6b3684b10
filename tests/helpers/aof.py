"""A Redis that goes back in time: its append-only file loses its end while it is down."""

from __future__ import annotations

import time
from pathlib import Path

import redis

from helpers.wait import until
from inferq.workers.process.embedded import EmbeddedRedis

#: For EmbeddedRedis: nothing is rewritten, so the file only grows.
AOF_ARGS = ("--auto-aof-rewrite-percentage", "0")


def aof_size(server: EmbeddedRedis) -> int:
    """Bytes that were appended so far."""
    _written(server)
    return _file(server).stat().st_size


def after_last(server: EmbeddedRedis, command: bytes, end: bytes) -> int:
    """Where the first `end` after the last `command` ends in the file."""
    _written(server)
    text = _file(server).read_bytes()
    found = text.index(end, text.rindex(command))
    return text.index(b"\r\n", found) + 2


def crash_back_to(server: EmbeddedRedis, size: int, down_s: float = 0.0) -> None:
    """Kill `server`, and start it again as it was when `aof_size` was `size`."""
    server.kill()
    time.sleep(down_s)
    with _file(server).open("r+b") as file:
        file.truncate(size)
    server.start()


def _written(server: EmbeddedRedis) -> None:
    """Wait until what was answered stands in the file: a busy disk puts that off."""
    with redis.Redis.from_url(server.url) as client:
        until(lambda: client.info("persistence")["aof_buffer_length"] == 0, what="all is written")


def _file(server: EmbeddedRedis) -> Path:
    (found,) = (server.directory / "appendonlydir").glob("*.incr.aof")
    return found
