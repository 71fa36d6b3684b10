"""Links, chains and chords of computed requests: published first, then the request is settled.

In that order a crash in between repeats a publication and never loses one, which is Celery's own
guarantee. One thread does it, for each model in turn; the data plane goes on meanwhile.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

import redis
from celery import Celery
from celery.app.task import Context
from msgspec.structs import replace

from inferq.shared import codec
from inferq.shared.celery_app import make_app
from inferq.shared.errors import EngineError, InferqError, from_wire
from inferq.shared.settings import Settings
from inferq.workers.canvas import celery_canvas
from inferq.workers.canvas.chord_claims import ChordClaims
from inferq.workers.canvas.chord_results import ChordResults
from inferq.workers.canvas.following import following
from inferq.workers.canvas.in_hand import InHand
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.canvas.pace import Pace
from inferq.workers.canvas.patience import Patience, Stopped
from inferq.workers.canvas.place import place_of
from inferq.workers.canvas.sender import LinkSender
from inferq.workers.claims.settlement import DEAD_LETTER, FAILURE, Settlement
from inferq.workers.logs.fields import about
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

Ready = Callable[[str, Settlement], None]

#: Seconds after which another thread runs while links are made.
SWITCH_S: Final = 0.0005


def _apps(settings: Settings) -> dict[str, Celery]:
    """Apps that write and read as a request of that content type did.

    What follows on a request may be a request, whose answer the same client reads; and chord parts
    of stock workers and ours meet in one Redis key.
    """
    apps = {codec.JSON: make_app(settings), codec.MSGPACK: make_app(settings)}
    apps[codec.MSGPACK].conf.update(task_serializer="msgpack", result_serializer="msgpack")
    return apps


@contextmanager
def _others_first() -> Iterator[None]:
    """Whoever waits for the interpreter meanwhile is given it soon.

    Celery makes 1,000 signatures without a break in 0.3 s. With Python's default of 5 ms a claim,
    which waits some 30 times, would take as long.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


class Canvas:
    """Publishes what follows on a request. `ready` is called once its settlement may go out."""

    def __init__(self, settings: Settings, client: redis.Redis, ready: Ready) -> None:
        self._client = client
        self._names = settings.names()
        self._expires_s = settings.result_expires_s
        self._ready = ready
        self._queues = LinkQueues(self._names, settings.link_queues)
        # Its own failures are those of single requests; how long one takes is asked of `waits_s`.
        self.loop = Periodic(
            "canvas",
            self._turn,
            every_s=math.inf,
            first_s=math.inf,
            stall_s=math.inf,
            failing="links are not published",
            logger=logger,
        )
        self._patience = Patience(client, self.loop)
        self._in_hand = InHand(client, self._names)
        self._pace = Pace()
        self._sender = LinkSender(
            client, self._names, self._queues, self._expires_s, self._patience, self._pace
        )
        self._chords = ChordResults(client, self._patience, self._pace.give_way)
        self._claims = ChordClaims(client, self._names)
        self._apps = _apps(settings)
        for app in self._apps.values():
            celery_canvas.divert(app, self._sender.take, self._push_body)
        self._inbox: SimpleQueue[tuple[str, Settlement, bytes]] = SimpleQueue()
        #: Those that wait, by model: one whose requests have many links keeps no other's waiting.
        self._waiting: dict[str, deque[tuple[str, Settlement, bytes]]] = {}

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        """End once the present one is published; the others are handed back with their claims."""
        self.loop.stop()

    def waits_s(self) -> float:
        """Seconds for which the links of one request have been waiting, though Redis is not full.

        Whether it answers others is for the caller to say.
        """
        return self._patience.waits_s()

    def put(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        """Publish what `message` asks for, then report `settlement` ready."""
        self._inbox.put((incarnation, settlement, message))
        self.loop.wake()

    def _turn(self) -> None:
        while not self.loop.stopping and (found := self._next()) is not None:
            incarnation, settlement, message = found
            try:
                with self._patience.of(settlement), _others_first():
                    done = self._published(incarnation, settlement, message)
            except Stopped:
                break
            # kill point: links-published
            self._in_hand.published()
            self._ready(incarnation, done)
        self._in_hand.rest()

    def _next(self) -> tuple[str, Settlement, bytes] | None:
        """The next one, of each model in turn."""
        waiting = self._waiting
        try:
            while True:
                put = self._inbox.get_nowait()
                waiting.setdefault(put[1].model, deque()).append(put)
        except Empty:
            pass
        if not waiting:
            return None
        model = next(iter(waiting))
        queue = waiting.pop(model)
        found = queue.popleft()
        if queue:
            waiting[model] = queue  # behind the others
        return found

    def _published(self, incarnation: str, settlement: Settlement, message: bytes) -> Settlement:
        """The settlement that may go out now."""
        model, request_id = settlement.model, settlement.request_id or ""
        try:
            self._patience(lambda: self._in_hand.begins(incarnation, model, request_id))
            # kill point: links-noted
            self._claims.begin(incarnation)
            stored = self._publish(settlement, message)
        except Stopped:
            raise
        except Exception as problem:
            told = about(settlement.request_id, model=settlement.model)
            expected = isinstance(problem, InferqError)
            logger.error(
                "links of %s cannot be published: %s",
                settlement.request_id,
                problem,
                extra=told,
                exc_info=not expected,
            )
            return self._failed(settlement, message, problem)
        return replace(settlement, stored=True) if stored else settlement

    def _publish(self, settlement: Settlement, message: bytes) -> bool:
        """Publish what follows; whether the result is stored already."""
        self._pace.begin()
        envelope = codec.decode_envelope(message)
        embed = codec.decode_body(envelope).embed
        follows = following(embed, len(message), self._queues, self._pace.give_way)
        app = self._app(envelope.content_type)
        request = celery_canvas.context_of(
            place_of(message),
            callbacks=follows.callbacks,
            errbacks=follows.errbacks,
            chain=follows.chain,
            chord=follows.chord,
        )
        # An ignored result is still what links and chords are given.
        meta = codec.decode_meta(settlement.outcome)
        # A chord of groups, and an errback, reads this result back.
        read_back = follows.chord or follows.errbacks or meta["status"] != "SUCCESS"
        stored = bool(read_back) and not settlement.ignore_result
        if stored:
            outcome = self._patience(lambda: self._first(request.id, settlement.outcome))
            first = codec.decode_meta(outcome)
            if not first["status"] == meta["status"] == "REVOKED":  # Celery's says it otherwise
                meta = first
        status, result = meta["status"], meta["result"]
        self._sender.begin()
        if status == "SUCCESS":
            self._push(lambda: celery_canvas.publish_success(app, request, result))
            self._finish(app, request, status, result)
        elif status == "REVOKED":
            revoked = celery_canvas.revoked_error(str(from_wire(status, result)))
            self._finish(app, request, status, revoked)
        else:
            error = from_wire(status, result)
            self._finish(app, request, status, error)
            self._push(lambda: celery_canvas.publish_failure(app, request, error))
        return stored

    def _app(self, content_type: str) -> Celery:
        app = self._apps[content_type]
        celery_canvas.be_current(app)
        celery_canvas.await_no_results(app)
        celery_canvas.join_by(app, partial(self._chords.of, app))
        celery_canvas.store_by(app, self._sender.store)
        celery_canvas.claim_by(app, self._claims)
        return app

    def _push_body(self, publish: Callable[[], object]) -> None:
        """Publish a chord's body. Stopped: whoever is given its last part again does."""
        try:
            self._sender.push_at_once(publish)
        except Stopped:
            self._claims.stays = True
            raise

    def _push(self, publish: Callable[[], None]) -> None:
        """Publish it once all of it is known to be good."""
        self._sender.push(self._patience(lambda: self._sender.collecting(publish)))

    def _finish(self, app: Celery, request: Context, status: str, result: object) -> None:
        self._patience(lambda: celery_canvas.finish_chord(app, request, status, result))

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
        error = (
            problem
            if isinstance(problem, InferqError)
            else EngineError(
                f"its links could not be published: {type(problem).__name__}: {problem}"
            )
        )
        now = datetime.now(UTC).isoformat()
        failure = codec.encode_failure(settlement.request_id, error, now, kind)
        ending = settlement.ending if settlement.ending == DEAD_LETTER else FAILURE
        return replace(settlement, outcome=failure, ending=ending, error=error.code)
