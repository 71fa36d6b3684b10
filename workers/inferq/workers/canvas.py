"""Links, chains and chords of computed requests: published first, then the request is settled.

In that order a crash in between repeats a publication and never loses one, which is Celery's own
guarantee. One thread with Celery's producer pool does it; the data plane goes on meanwhile.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Final

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from msgspec.structs import replace
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from inferq.shared import codec
from inferq.shared.celery_app import make_app
from inferq.shared.errors import EngineError, from_wire
from inferq.shared.settings import Settings
from inferq.workers import celery_private
from inferq.workers.logs.fields import about
from inferq.workers.periodic import Periodic
from inferq.workers.settle import DEAD_LETTER, FAILURE, Settlement

logger = logging.getLogger(__name__)

#: Seconds between tries while Redis cannot be reached.
RETRY_S = 0.5

Ready = Callable[[str, Settlement], None]

#: Redis cannot be reached, or is full. All else stays as it is however often it is tried: what
#: redis-py cannot write, for one, would keep all other links waiting for ever.
_PASSING: Final = redis.ConnectionError | redis.TimeoutError | OutOfMemoryError | ReadOnlyError


def _apps(settings: Settings) -> dict[str, Celery]:
    """Apps that write and read as a request of that content type did.

    What follows on a request may be a request, whose answer the same client reads; and chord parts
    of stock workers and ours meet in one Redis key.
    """
    apps = {codec.JSON: make_app(settings), codec.MSGPACK: make_app(settings)}
    apps[codec.MSGPACK].conf.update(task_serializer="msgpack", result_serializer="msgpack")
    for app in apps.values():
        # `Canvas` tries again itself. kombu would do so at once, on a channel that may be broken.
        app.conf.task_publish_retry = False
    return apps


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


class Canvas:
    """Publishes what follows on a request. `ready` is called once its settlement may go out."""

    def __init__(self, settings: Settings, client: redis.Redis, ready: Ready) -> None:
        self._apps = _apps(settings)
        self._client = client
        self._names = settings.names()
        self._expires_s = settings.result_expires_s
        self._ready = ready
        self._inbox: SimpleQueue[tuple[str, Settlement, bytes]] = SimpleQueue()
        #: Since when (monotonic s) the present one waits, or Redis is known to be full; None: none.
        self._since: float | None = None
        # Its own failures are those of single requests; how long one takes is asked of `waits_s`.
        self.loop = Periodic(
            "canvas", self._turn, every_s=math.inf, first_s=math.inf, stall_s=math.inf,
            failing="links are not published", logger=logger,
        )  # fmt: skip

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        """End once the present one is published; the others are handed back with their claims."""
        self.loop.stop()

    def waits_s(self) -> float:
        """Seconds for which the links of one request have been waiting, though Redis is not full.

        Whether it answers others is for the caller to say.
        """
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def put(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        """Publish what `message` asks for, then report `settlement` ready."""
        self._inbox.put((incarnation, settlement, message))
        self.loop.wake()

    def _turn(self) -> None:
        while not self.loop.stopping:
            try:
                incarnation, settlement, message = self._inbox.get_nowait()
            except Empty:
                return
            self._since = time.monotonic()
            try:
                done = self._published(settlement, message)
            finally:
                self._since = None
            if done is not None:
                self._ready(incarnation, done)

    def _published(self, settlement: Settlement, message: bytes) -> Settlement | None:
        """The settlement that may go out now; None: stopped before that."""
        while not self.loop.stopping:
            try:
                stored = self._publish(settlement, message)
            except Exception as problem:
                told = about(settlement.request_id, model=settlement.model)
                if not _passes(problem):
                    logger.exception(
                        "links of %s cannot be published", settlement.request_id, extra=told
                    )
                    return self._failed(settlement, message, problem)
                logger.warning("links of %s wait: %s", settlement.request_id, problem, extra=told)
                if _is_full(problem):  # no restart would help
                    self._since = time.monotonic()
                self.loop.pause(RETRY_S)
            else:
                return replace(settlement, stored=True) if stored else settlement
        return None

    def _publish(self, settlement: Settlement, message: bytes) -> bool:
        """Publish what follows; whether the result is stored already."""
        envelope = codec.decode_envelope(message)
        body = codec.decode_body(envelope)
        request = celery_private.context_of(message, (body.args, body.kwargs, body.embed))
        app = self._apps[envelope.content_type]
        celery_private.await_no_results(app)
        # An ignored result is still what links and chords are given.
        meta = codec.decode_meta(settlement.outcome)
        # A chord of groups, and an errback, reads this result back.
        read_back = request.chord or request.errbacks or meta["status"] != "SUCCESS"
        stored = bool(read_back) and not settlement.ignore_result
        if stored:
            first = codec.decode_meta(self._first(request.id, settlement.outcome))
            if not first["status"] == meta["status"] == "REVOKED":  # Celery's says it otherwise
                meta = first
        status, result = meta["status"], meta["result"]
        if status == "SUCCESS":
            celery_private.publish_success(app, request, result)
            celery_private.finish_chord(app, request, status, result)
        elif status == "REVOKED":
            revoked = celery_private.revoked_error(str(from_wire(status, result)))
            celery_private.finish_chord(app, request, status, revoked)
        else:
            error = from_wire(status, result)
            celery_private.finish_chord(app, request, status, error)
            celery_private.publish_failure(app, request, error)
        return stored

    def _first(self, request_id: str, outcome: bytes) -> bytes:
        """Store `outcome`, unless the request has a result, which then is what counts."""
        key = self._names.meta(request_id)
        if self._client.set(key, outcome, ex=self._expires_s, nx=True):
            return outcome
        found = self._client.get(key)
        return found if isinstance(found, bytes) else outcome

    def _failed(self, settlement: Settlement, message: bytes, problem: Exception) -> Settlement:
        if settlement.request_id is None:
            return settlement
        try:
            kind = codec.decode_envelope(message).content_type
        except codec.MalformedMessage:
            kind = codec.JSON
        error = EngineError(f"its links could not be published: {problem!r}")
        now = datetime.now(UTC).isoformat()
        failure = codec.encode_failure(settlement.request_id, error, now, kind)
        ending = settlement.ending if settlement.ending == DEAD_LETTER else FAILURE
        return replace(settlement, outcome=failure, ending=ending, error=error.code)
