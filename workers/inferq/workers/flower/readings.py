"""Reads Redis for Flower's pages, outside of Flower's event loop; keeps readings for a second."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names, is_model_name, model_of
from inferq.workers.data_plane.counts import WorkerStats
from inferq.workers.metrics.published import read_stats
from inferq.workers.queues.depths import DepthReader, Depths

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Timeouts of the connection to Redis, in s. After them a page says that Redis is away.
CONNECT_TIMEOUT_S: Final = 1.0
SOCKET_TIMEOUT_S: Final = 2.0
#: Seconds that a page waits for a reading. After that it shows the one before.
PATIENCE_S: Final = 4.0
#: Seconds for which a reading is used again.
FRESH_S: Final = 1.0
#: Most models, and most foreign queues, that are read.
MODELS: Final = 500
FOREIGN: Final = 200
#: Looking for models reads all keys of Redis. So it is done every `LOOK_EVERY_S` seconds and, if it
#: takes long, for at most one part in `LOOK_SHARE` of the time. Models with a worker are known
#: without it.
LOOK_EVERY_S: Final = 2.0
LOOK_SHARE: Final = 10


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One reading of Redis."""

    #: time.monotonic() at its end.
    at: float
    depths: Depths
    #: Messages in queues that are not inferq's, by name.
    foreign: Mapping[str, int]
    stats: Sequence[WorkerStats]
    #: Models beyond `MODELS`.
    left_out: int

    def notes(self) -> list[str]:
        """Sentences that say what is not shown."""
        unread = self.depths.later_unread
        told = {
            f"{self.left_out} more models are not shown.": self.left_out,
            f"{unread} more requests with an ETA are not counted to their model.": unread,
        }
        return [note for note, count in told.items() if count]


@dataclass(frozen=True)
class Latest:
    """The last good reading (None: there was none yet), and why there is no newer one."""

    reading: Reading | None
    problem: str | None = None


class Readings:
    """Reads at most once per `FRESH_S`, for all callers. Use it from one event loop."""

    def __init__(
        self, client: redis.Redis, names: Names, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._names = names
        self._reader = DepthReader(client, names)
        self._clock = clock
        # One thread reads and one looks for models: a Redis that hangs blocks no more than these.
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="inferq-readings")
        self._last: Reading | None = None
        self._problem: str | None = None
        self._read_at = -math.inf
        self._reading: asyncio.Future[None] | None = None
        #: All models that have a queue or other keys, those of workers first; None: not looked for
        #: yet.
        self._models: list[str] | None = None
        self._look_at = -math.inf
        self._looking: asyncio.Future[None] | None = None

    async def latest(self, queues: Collection[str] = ()) -> Latest:
        """The latest reading. `queues`: foreign queues to count as well.

        Raises no errors of Redis, and waits at most `PATIENCE_S`.
        """
        now = self._clock()
        if self._looking is None and now >= self._look_at:
            self._looking = asyncio.ensure_future(self._look())
        if self._reading is None and now >= self._read_at:
            foreign = sorted(queue for queue in queues if model_of(queue) is None)[:FOREIGN]
            self._reading = asyncio.ensure_future(self._read(foreign))
        if self._reading is not None:
            waited, _ = await asyncio.wait({self._reading}, timeout=PATIENCE_S)
            if not waited:
                return Latest(self._last, f"Redis has not answered for {PATIENCE_S:g} s")
        return Latest(self._last, self._problem)

    async def _look(self) -> None:
        """Find all models. That may take long; meanwhile readings use those known before."""
        began, wait_s = self._clock(), LOOK_EVERY_S
        try:
            self._models = await self._in_thread(self._reader.models)
            wait_s = max(wait_s, LOOK_SHARE * (self._clock() - began))
        except RedisError as problem:
            logger.debug("models were not looked for: %s", problem)  # the reading reports it
        except Exception:
            logger.exception("models could not be looked for")
        finally:
            self._look_at = self._clock() + wait_s
            self._looking = None

    async def _read(self, foreign: Sequence[str]) -> None:
        try:
            if self._models is None and self._looking is not None:
                await self._looking
            self._last = await self._in_thread(self._ask, self._models or (), foreign)
            self._problem = None
        except RedisError as problem:
            self._problem = f"Redis: {problem}"
        except Exception:
            logger.exception("the queues could not be read")
            self._problem = "the queues could not be read; Flower's log says why"
        finally:
            self._read_at = self._clock() + FRESH_S
            self._reading = None

    async def _in_thread(self, ask: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, ask, *given)

    def _ask(self, known: Sequence[str], foreign: Sequence[str]) -> Reading:
        stats = read_stats(self._client, self._names)
        served = {model.model for worker in stats for model in worker.models}
        # Models that workers know come first: anybody who may push can make any number of others.
        models = list(dict.fromkeys([*sorted(filter(is_model_name, served)), *known]))
        return Reading(
            depths=self._reader.read(sorted(models[:MODELS])),
            foreign=self._lengths(foreign),
            stats=stats,
            left_out=max(0, len(models) - MODELS),
            at=self._clock(),
        )

    def _lengths(self, queues: Sequence[str]) -> dict[str, int]:
        names = self._names
        with self._client.pipeline(transaction=False) as pipe:
            for queue in queues:
                for step in names.priority_steps:
                    end = f"{names.sep}{step}" if step else ""
                    pipe.llen(f"{names.prefix}{queue}{end}")
            lengths = pipe.execute(raise_on_error=False)
        steps = len(names.priority_steps)
        # A key that is no list counts as empty.
        counts = [each if isinstance(each, int) else 0 for each in lengths]
        return {queue: sum(counts[n * steps : (n + 1) * steps]) for n, queue in enumerate(queues)}
