"""What Redis says, for Flower's pages: read off Flower's event loop and kept for a second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names, model_of
from inferq.workers.depths import DepthReader, Depths
from inferq.workers.metrics.counts import WorkerStats
from inferq.workers.metrics.published import read_stats

logger = logging.getLogger(__name__)

#: Of the connection to Redis, in s: a page says that it is away rather than wait longer.
CONNECT_TIMEOUT_S: Final = 1.0
SOCKET_TIMEOUT_S: Final = 2.0
#: Seconds that a page waits for a reading; what it shows then is the one before.
PATIENCE_S: Final = 4.0
#: Seconds that a reading serves all who ask.
FRESH_S: Final = 1.0
#: Models, and queues of others, that are read at most.
MODELS: Final = 500
FOREIGN: Final = 200
#: Looking for models goes through all keys of Redis. So it is done every `LOOK_EVERY_S` seconds,
#: and where it takes long, for one part in `LOOK_SHARE` of the time.
LOOK_EVERY_S: Final = 2.0
LOOK_SHARE: Final = 20


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One look at Redis."""

    #: time.monotonic() at its end.
    at: float
    depths: Depths
    #: Messages in queues that are none of ours, by name.
    foreign: Mapping[str, int]
    stats: Sequence[WorkerStats]
    #: Models beyond `MODELS`.
    left_out: int

    def notes(self) -> list[str]:
        """What is not shown, in words."""
        unread = self.depths.later_unread
        told = {
            f"{self.left_out} more models are not shown.": self.left_out,
            f"{unread} more requests with an ETA are not counted to their model.": unread,
        }
        return [note for note, count in told.items() if count]


@dataclass(frozen=True)
class Told:
    """The last good reading (None: there was none yet), and why there is none of now."""

    reading: Reading | None
    problem: str | None = None


@dataclass
class _Look:
    models: list[str] = field(default_factory=list)
    left_out: int = 0
    next_at: float = 0.0


class Readings:
    """Reads at most once per `FRESH_S`, whoever asks. Use it from one event loop."""

    def __init__(
        self, client: redis.Redis, names: Names, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._names = names
        self._reader = DepthReader(client, names)
        self._clock = clock
        # One thread: a Redis that hangs holds no more than that.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="inferq-readings")
        self._look = _Look()
        self._last: Reading | None = None
        self._problem: str | None = None
        self._tried = -FRESH_S
        self._running: asyncio.Future[None] | None = None

    async def latest(self, queues: Collection[str] = ()) -> Told:
        """What is known now; `queues` names others, foreign to inferq, to be counted too.

        Never raises for Redis' sake, and waits `PATIENCE_S` at most.
        """
        if self._running is None and self._clock() - self._tried >= FRESH_S:
            foreign = sorted(queue for queue in queues if model_of(queue) is None)[:FOREIGN]
            self._running = asyncio.ensure_future(self._read(foreign))
        if self._running is not None:
            waited, _ = await asyncio.wait({self._running}, timeout=PATIENCE_S)
            if not waited:
                return Told(self._last, f"Redis has not answered for {PATIENCE_S:g} s")
        return Told(self._last, self._problem)

    async def _read(self, foreign: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._last = await loop.run_in_executor(self._executor, self._look_at_redis, foreign)
            self._problem = None
        except RedisError as problem:
            self._problem = f"Redis: {problem}"
        except Exception:
            logger.exception("the queues could not be read")
            self._problem = "the queues could not be read; Flower's log says why"
        finally:
            self._tried = self._clock()
            self._running = None

    def _look_at_redis(self, foreign: Sequence[str]) -> Reading:
        self._look_for_models()
        depths = self._reader.read(self._look.models)
        return Reading(
            depths=depths,
            foreign=self._lengths(foreign),
            stats=read_stats(self._client, self._names),
            left_out=self._look.left_out,
            at=self._clock(),
        )

    def _look_for_models(self) -> None:
        look, began = self._look, self._clock()
        if began < look.next_at:
            return
        found = self._reader.models()
        look.models, look.left_out = found[:MODELS], max(0, len(found) - MODELS)
        now = self._clock()
        look.next_at = now + max(LOOK_EVERY_S, LOOK_SHARE * (now - began))

    def _lengths(self, queues: Sequence[str]) -> dict[str, int]:
        names = self._names
        with self._client.pipeline(transaction=False) as pipe:
            for queue in queues:
                for step in names.priority_steps:
                    end = f"{names.sep}{step}" if step else ""
                    pipe.llen(f"{names.prefix}{queue}{end}")
            lengths = pipe.execute(raise_on_error=False)
        steps = len(names.priority_steps)
        # A name that holds something else than a list counts as empty.
        counts = [each if isinstance(each, int) else 0 for each in lengths]
        return {queue: sum(counts[n * steps : (n + 1) * steps]) for n, queue in enumerate(queues)}
