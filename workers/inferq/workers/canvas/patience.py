"""How long the links of a request are tried: while Redis is away or full, and little longer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import redis
from kombu.exceptions import OperationalError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError

from inferq.shared.errors import EngineError
from inferq.workers.claims.settlement import Settlement
from inferq.workers.logs.fields import about
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between tries while Redis cannot be reached.
RETRY_S = 0.5
#: Seconds of tries that fail though Redis answers, after which one request's links are given up:
#: before anybody takes the worker for stuck (health.STUCK_S), as the next one would be, too.
GIVE_UP_S = 20.0

#: Redis cannot be reached, or is full. All else stays as it is however often it is tried: what
#: redis-py cannot write, for one, would keep all other links waiting for ever.
_PASSING: Final = redis.ConnectionError | redis.TimeoutError | OutOfMemoryError | ReadOnlyError


class Stopped(BaseException):
    """The worker stops before they are published. Celery takes no notice of it on its way."""


def _passes(problem: Exception) -> bool:
    """Whether trying again may help: Redis is away or full, rather than asked the impossible."""
    if isinstance(problem, OperationalError):
        return isinstance(problem.__cause__, _PASSING | OSError)
    return isinstance(problem, _PASSING)


def _is_full(problem: Exception) -> bool:
    """Whether Redis answers, and takes nothing: it is full, a replica, or has all its clients."""
    cause = problem.__cause__ if isinstance(problem, OperationalError) else problem
    full = isinstance(cause, OutOfMemoryError | ReadOnlyError)
    return full or "max number of clients" in str(cause)


class Patience:
    """Tries what the thread of `loop` does for one request after another."""

    def __init__(self, client: redis.Redis, loop: Periodic) -> None:
        self._client = client
        self._loop = loop
        self._of: Settlement | None = None
        #: Since when (monotonic s) the present one waits, or Redis is known to be full; None: none.
        self._since: float | None = None

    def waits_s(self) -> float:
        """Seconds for which the present one has been waiting, though Redis is not full."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @contextmanager
    def of(self, settlement: Settlement) -> Iterator[None]:
        """What is tried within is for this request."""
        self._of, self._since = settlement, time.monotonic()
        try:
            yield
        finally:
            self._of = self._since = None

    def __call__(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, called until it succeeds or no other try would change a thing.

        EngineError: it goes on failing though Redis answers. Stopped: the worker stops first; what
        Celery has begun is tried once all the same, as it takes that for a failure of its own.
        """
        failing_since: float | None = None
        while True:
            try:
                return attempt()
            except Exception as problem:
                if not _passes(problem):
                    raise
                self._tell(problem)
                if _is_full(problem):  # no restart would help
                    self._since = time.monotonic()
                    failing_since = None
                elif not self._answers():
                    failing_since = None
                elif failing_since is None:
                    failing_since = time.monotonic()
                elif time.monotonic() - failing_since > GIVE_UP_S:
                    raise EngineError(
                        f"its links could not be published for {GIVE_UP_S:g} s, though Redis "
                        f"answers: {problem}"
                    ) from problem
            self._loop.pause(RETRY_S)
            if self._loop.stopping:
                raise Stopped

    def _answers(self) -> bool:
        try:
            return bool(self._client.ping())
        except RedisError:
            return False

    def _tell(self, problem: Exception) -> None:
        if self._of is not None:
            told = about(self._of.request_id, model=self._of.model)
            logger.warning("links of %s wait: %s", self._of.request_id, problem, extra=told)
