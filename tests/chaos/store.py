"""The real Redis of a run: killed, its AOF's tail cut off, started again."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.workers.embedded import EmbeddedRedis

#: How often the AOF's size is looked at, in seconds, and how much of it a cut tail is.
SAMPLE_S = 0.05
TAIL_S = 1.0


@dataclass(frozen=True)
class Restart:
    """One restart, in monotonic seconds."""

    killed_at: float
    back_at: float
    #: Bytes of the AOF that were cut off.
    cut: int
    #: Whether what Redis had answered may be gone: it was not written through.
    rolled_back: bool


class Store:
    """One thread owns it; `restarts` may be read by any."""

    def __init__(self) -> None:
        self.server = EmbeddedRedis(appendonly=True, args=["--auto-aof-rewrite-percentage", "0"])
        self.restarts: list[Restart] = []
        self._sizes: deque[tuple[float, int]] = deque(maxlen=round(4 * TAIL_S / SAMPLE_S))
        self._fsync = "everysec"
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="chaos-aof", daemon=True)

    def start(self) -> None:
        self.server.start()
        self._sampler.start()

    def stop(self) -> None:
        self._ended.set()
        if self._sampler.is_alive():
            self._sampler.join(5)
        self.server.stop()

    def client(self) -> redis.Redis:
        """A client straight to it, past the proxy."""
        return redis.Redis.from_url(
            self.server.url, socket_timeout=10.0, retry=Retry(NoBackoff(), 0)
        )

    def restart(self, down_s: float, *, cut_tail: bool, fsync: str) -> None:
        """SIGKILL it, keep it down, start it; `fsync` is its appendfsync from then on."""
        if cut_tail and self._fsync != "everysec":
            raise RuntimeError("nothing is lost of an AOF that is written through")
        killed_at = time.monotonic()
        self.server.kill()
        cut = self._cut_tail(killed_at) if cut_tail else 0
        rolled_back = self._fsync == "everysec"
        self._ended.wait(down_s)
        self.server.start()
        with self.client() as client:
            client.config_set("appendfsync", fsync)
        self._fsync = fsync
        self.restarts.append(Restart(killed_at, time.monotonic(), cut, rolled_back))

    def _aof(self) -> Path | None:
        files = sorted((self.server.directory / "appendonlydir").glob("*.incr.aof"))
        return files[-1] if files else None

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            aof = self._aof()
            if aof is not None:
                self._sizes.append((time.monotonic(), aof.stat().st_size))

    def _cut_tail(self, killed_at: float) -> int:
        aof = self._aof()
        if aof is None:
            raise RuntimeError("Redis has no AOF")
        # A copy, for the sampler goes on.
        before = [size for at, size in list(self._sizes) if at <= killed_at - TAIL_S]
        size = aof.stat().st_size
        kept = before[-1] if before else size
        with aof.open("r+b") as file:
            file.truncate(kept)
        return size - kept
