"""Observers are told what becomes of requests: task events, counts and the batch log.

The request path calls them once for each batch, claim or MULTI, and never for a single request. If
an observer raises, that is logged; requests go on, and the other observers are told all the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Finished
from inferq.workers.claims.settlement import Settlement
from inferq.workers.claims.verdicts import Failed, Revoked
from inferq.workers.process.periodic import Sayings

logger = logging.getLogger(__name__)

News = TypeVar("News")


class Settled(msgspec.Struct, frozen=True):
    """What one MULTI has settled, as Redis has confirmed."""

    settlements: Sequence[Settlement]
    #: Places of settlements whose request had another result already.
    overtaken: frozenset[int]
    #: When Redis answered, in ms of the monotonic clock and of Redis' clock.
    at_mono_ms: float
    redis_ms: float


class Observer:
    """Base of observers. Each overrides the methods it needs; the others are never called.

    Methods return at once. The data plane's thread calls all of them except `started`.
    """

    def claimed(self, items: Sequence[Waiting]) -> None:
        """These requests were claimed and read, and wait for a lane."""

    def refused(self, ended: Sequence[Failed | Revoked]) -> None:
        """These requests were claimed and end without waiting for a lane.

        They are settled later.
        """

    def started(self, items: Sequence[Waiting]) -> None:
        """A lane begins to compute this batch. Called from the lane's thread."""

    def finished(self, finished: Finished) -> None:
        """A lane has ended a batch; its requests are settled later."""

    def settled(self, settled: Settled) -> None:
        """Redis has confirmed what one MULTI settled."""


class Observers:
    """Calls each of `members`, in this order."""

    def __init__(self, members: Iterable[Observer] = ()) -> None:
        some = list(members)
        self._claimed = [o.claimed for o in some if type(o).claimed is not Observer.claimed]
        self._refused = [o.refused for o in some if type(o).refused is not Observer.refused]
        self._started = [o.started for o in some if type(o).started is not Observer.started]
        self._finished = [o.finished for o in some if type(o).finished is not Observer.finished]
        self._settled = [o.settled for o in some if type(o).settled is not Observer.settled]
        self._sayings = Sayings()
        #: Lanes' threads call `started`.
        self._saying = threading.Lock()

    def claimed(self, items: Sequence[Waiting]) -> None:
        self._tell(self._claimed, items)

    def refused(self, ended: Sequence[Failed | Revoked]) -> None:
        self._tell(self._refused, ended)

    def started(self, items: Sequence[Waiting]) -> None:
        self._tell(self._started, items)

    def finished(self, finished: Finished) -> None:
        self._tell(self._finished, finished)

    def settled(self, settled: Settled) -> None:
        self._tell(self._settled, settled)

    def _tell(self, methods: Sequence[Callable[[News], None]], news: News) -> None:
        for method in methods:
            try:
                method(news)
            except Exception as problem:  # noqa: BLE001 - logged, less and less often
                self._say(method.__qualname__, problem)

    def _say(self, method: str, problem: Exception) -> None:
        try:
            with self._saying:
                unsaid = self._sayings.due(f"{method} {type(problem).__name__}")
            if unsaid is not None:
                more = f" (and {unsaid} more like it before)" if unsaid else ""
                logger.error(
                    "%s raised; requests are served all the same%s",
                    method,
                    more,
                    exc_info=problem,
                )
        except Exception:  # noqa: BLE001 - no request fails because a log cannot be written
            return
