"""The real Redis of a run: killed, its AOF's tail cut off, started again.

It has the users of deploy/redis/users.acl: workers and producers of a run are these, and can do no
more.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import redis
from helpers.acl import configuration, with_user
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.workers.process.embedded import EmbeddedRedis

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
    #: It went back further than workers keep results: what was accepted since then may be gone.
    back_to: float | None = None


@dataclass(frozen=True)
class Mark:
    """What Redis is to go back to: so much of its AOF; all that was pushed before `began` is in."""

    aof_bytes: int
    began: float


class Store:
    """One thread owns it; `restarts` may be read by any."""

    def __init__(self) -> None:
        self._password = secrets.token_hex(16)
        self._folder = tempfile.TemporaryDirectory(prefix="inferq-chaos-users-")
        users = Path(self._folder.name) / "users.conf"
        users.write_text(configuration(self._password))
        self.server = EmbeddedRedis(
            appendonly=True,
            args=["--auto-aof-rewrite-percentage", "0", "--include", str(users)],
        )
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
        self._folder.cleanup()

    def as_user(self, role: str, url: str | None = None) -> str:
        """`url`, or that straight to it, as the user of `role` connects."""
        return with_user(url or self.server.url, role, self._password)

    def client(self, role: str | None = None) -> redis.Redis:
        """A client straight to it, past the proxy: the operator's, or that of `role`."""
        url = self.as_user(role) if role else self.server.url
        return redis.Redis.from_url(url, socket_timeout=10.0, retry=Retry(NoBackoff(), 0))

    def restart(
        self, down_s: float, *, cut_tail: bool, fsync: str, mark: Mark | None = None
    ) -> None:
        """SIGKILL it, keep it down, start it; `fsync` is its appendfsync from then on.

        Where its tail is cut, that is the last `TAIL_S`, or what is behind `mark`.
        """
        if cut_tail and self._fsync != "everysec":
            raise RuntimeError("nothing is lost of an AOF that is written through")
        killed_at = time.monotonic()
        self.server.kill()
        cut = 0
        if cut_tail:
            cut = self._cut_to(mark.aof_bytes if mark else self._tail_at(killed_at))
        rolled_back = self._fsync == "everysec"
        self._ended.wait(down_s)
        self.server.start()
        with self.client() as client:
            client.config_set("appendfsync", fsync)
        self._fsync = fsync
        back_to = mark.began if mark else None
        self.restarts.append(Restart(killed_at, time.monotonic(), cut, rolled_back, back_to))

    def aof_bytes(self) -> int:
        """How much was appended so far, once all that was answered is."""
        with self.client() as client:
            while client.info("persistence")["aof_buffer_length"]:
                time.sleep(0.01)
        return self._the_aof().stat().st_size

    def read_aof(self, start: int, end: int | None = None) -> bytes:
        """What was appended between these places; None: up to now."""
        end = self.aof_bytes() if end is None else end
        with self._the_aof().open("rb") as aof:
            aof.seek(start)
            return aof.read(end - start)

    def _aof(self) -> Path | None:
        files = sorted((self.server.directory / "appendonlydir").glob("*.incr.aof"))
        return files[-1] if files else None

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            aof = self._aof()
            if aof is not None:
                self._sizes.append((time.monotonic(), aof.stat().st_size))

    def _the_aof(self) -> Path:
        aof = self._aof()
        if aof is None:
            raise RuntimeError("Redis has no AOF")
        return aof

    def _tail_at(self, killed_at: float) -> int:
        """Where in the AOF the last `TAIL_S` before `killed_at` begin."""
        # A copy, for the sampler goes on.
        before = [size for at, size in list(self._sizes) if at <= killed_at - TAIL_S]
        return before[-1] if before else self._the_aof().stat().st_size

    def _cut_to(self, kept: int) -> int:
        aof = self._the_aof()
        size = aof.stat().st_size
        with aof.open("r+b") as file:
            file.truncate(kept)
        return size - kept
