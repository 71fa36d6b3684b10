"""Puts what a dead worker held back into the queues it came from, in its order there.

Any worker recovers any other. `give_back` is also how a worker that stops hands back its own.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass

import redis
from redis.exceptions import RedisError

from inferq.shared.lua import source
from inferq.shared.names import ClaimName, Names, glob_of
from inferq.shared.resp import Command
from inferq.workers.claims.oom import attempted
from inferq.workers.claims.wrong_type import (
    HASH,
    LIST,
    NO_ATTEMPTS,
    NO_RECOVERY,
    NOTHING_CLAIMED,
    ZSET,
    WrongTypeReports,
    is_wrong_type,
    type_of,
)
from inferq.workers.logs.fields import about
from inferq.workers.process.periodic import Periodic, Sayings

logger = logging.getLogger(__name__)

#: How often expired leases are looked for, in seconds.
SCAN_EVERY_S = 0.5
#: Time one recovery has before another worker takes it over, in ms. Two at once do no harm. If a
#: recovering worker dies, requests are still back within 15 s.
RECOVERY_LEASE_MS = 3_000
#: How long attempts:<m> is kept after the last death, in seconds. Entries of requests that never
#: come again must not make their model suspicious for ever.
ATTEMPTS_TTL_S = 24 * 3600
_MOVES_PER_TRIP = 64


def decoding_field(message: bytes) -> str:
    """The field of attempts:<m> that counts deaths while decoding these bytes."""
    return f"#{hashlib.sha1(message, usedforsecurity=False).hexdigest()}"


def linking_field(request_id: str) -> str:
    """The field of attempts:<m> that counts deaths while the request's links were published."""
    return f"@{request_id}"


@dataclass(frozen=True)
class GivenBack:
    """How many requests were moved; `left`: claims left, as their queue has the wrong type."""

    moved: int
    left: int


def give_back(
    client: redis.Redis, names: Names, incarnation: str, wrong_types: WrongTypeReports
) -> GivenBack:
    """Move all that `incarnation` holds back to its queues.

    Newest claim first and, within a claim, newest request first, each to the queue's right end. So
    the oldest request is claimed first again. The fence must be gone already.
    """
    claims = sorted(_held(client, names, incarnation), key=lambda c: c.number, reverse=True)
    moved = left = 0
    for claim in claims:
        key = names.claim(claim.incarnation, claim.number, claim.model, claim.step)
        try:
            moved += _move(client, names, claim, key)
        except RedisError as problem:
            if not is_wrong_type(problem):
                raise
            if (kind := type_of(client, key)) not in (LIST, "none"):
                logger.error(
                    "key %r is a %s; expected a list, a claim of a dead worker. The key stays",
                    key,
                    kind,
                )
            else:
                left += 1
                queue = names.queue(claim.model, claim.step)
                wrong_types.report(queue, type_of(client, queue), LIST, NOTHING_CLAIMED)
                continue
        else:
            if wrong_types:
                wrong_types.resolve(names.queue(claim.model, claim.step))
        # kill point: giveback-claim-moved
        client.hdel(names.claims(incarnation), key)
    return GivenBack(moved, left)


def _held(client: redis.Redis, names: Names, incarnation: str) -> list[ClaimName]:
    """The claims of `incarnation`."""
    key = names.claims(incarnation)
    try:
        fields: list[bytes] = client.hkeys(key)  # type: ignore[assignment]
    except RedisError as problem:
        if not is_wrong_type(problem):
            raise
        kind = type_of(client, key)
        logger.error("key %r is a %s; expected a hash: claims are searched by name", key, kind)
        fields = list(client.scan_iter(match=f"{glob_of(names.claim_head(incarnation))}*"))
        with client.pipeline(transaction=True) as pipe:
            pipe.unlink(key)
            if fields:  # a hash again: a later recovery finds what stays now
                pipe.hset(key, mapping=dict.fromkeys(fields, 1))
            pipe.execute()
    claims = []
    for field in fields:
        try:
            claim = names.parse_claim(field.decode())
            if claim.incarnation != incarnation:
                raise ValueError("of another worker")
        except ValueError as problem:
            logger.error("%r in %s is no claim and is removed: %s", field, key, problem)
            client.hdel(key, field)
        else:
            claims.append(claim)
    return claims


def _move(client: redis.Redis, names: Names, claim: ClaimName, key: str) -> int:
    client.lrem(key, 0, b"")  # type: ignore[arg-type]
    queue = names.queue(claim.model, claim.step)
    moved = 0
    moves: list[Command] = [("LMOVE", key, queue, "LEFT", "RIGHT")] * _MOVES_PER_TRIP
    while True:
        replies = attempted(client, names, moves)
        got = sum(isinstance(item, bytes) for item in replies)
        moved += got
        problem = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if problem is not None:
            raise problem
        if got < _MOVES_PER_TRIP:
            return moved
        # kill point: giveback-between-moves


class Recoverer:
    """The thread that watches the leases of all workers.

    It acts only after Redis was up and reachable for one whole lease. After an outage, or after
    Redis went back in time, leases look expired until their workers have renewed them.
    """

    def __init__(self, client: redis.Redis, names: Names, lease_s: float) -> None:
        self._client = client
        self._names = names
        self._lease_s = lease_s
        self._expired = client.register_script(source("expired"))
        self._revoke = client.register_script(source("revoke"))
        #: The run id of the Redis that answers, and since when it has answered (monotonic s).
        self._run_id = ""
        self._up_since: float | None = None
        self._wrong_types = WrongTypeReports()
        self._sayings = Sayings()
        #: Protocol versions whose leases were lost: every worker with a fence or claims gets a new
        #: one.
        self._lost: set[Names] = set()
        self.loop = Periodic(
            "recovery",
            self._turn,
            every_s=SCAN_EVERY_S,
            first_s=SCAN_EVERY_S,
            failing="recovery",
            logger=logger,
        )

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        self.loop.stop()

    def leases_lost(self) -> None:
        """Note that somebody removed all leases: without one, no dead worker is recovered."""
        self._lost.add(self._names)

    def _turn(self) -> None:
        try:
            # The client reconnects silently: only the run id shows a quick restart.
            run_id = self._client.info("server").get("run_id", "?")
            if run_id != self._run_id:
                self._run_id, self._up_since = run_id, time.monotonic()
            for names in self._names.all_protocols():
                self._look(names)
        except RedisError:
            self._run_id, self._up_since = "", None
            raise

    def _look(self, names: Names) -> None:
        """Recover every worker whose lease has expired."""
        try:
            expired: list[bytes] = self._expired(keys=[names.leases], args=[100])
        except RedisError as problem:
            if not is_wrong_type(problem):
                raise
            self._wrong_types.report(
                names.leases, type_of(self._client, names.leases), ZSET, NO_RECOVERY
            )
            return
        if self._wrong_types and self._wrong_types.resolve(names.leases):
            self._lost.add(names)
        if names in self._lost:
            self._lease_again(names)
            self._lost.discard(names)
        if self._up_since is None or time.monotonic() - self._up_since < self._lease_s:
            return
        for member in expired:
            try:
                incarnation = member.decode()
            except UnicodeDecodeError:
                logger.error("%r in %s is no worker's name and is removed", member, names.leases)
                self._client.zrem(names.leases, member)
            else:
                self._try(incarnation, names)

    def _lease_again(self, names: Names) -> None:
        """Give a lease to every worker that has a fence or claims. Those that live renew it."""
        seconds, micros = self._client.time()
        ends_ms = seconds * 1000 + micros / 1000 + self._lease_s * 1000
        for head in (names.fence(""), names.claims("")):
            for key in self._client.scan_iter(match=f"{glob_of(head)}*", count=1000):
                incarnation = bytes(key).removeprefix(head.encode())
                self._client.zadd(names.leases, {incarnation: ends_ms}, nx=True)

    def _try(self, incarnation: str, names: Names) -> None:
        try:
            self.recover(incarnation, names)
        except (redis.ConnectionError, redis.TimeoutError):
            raise
        except Exception:  # one worker's keys must not prevent the recovery of others
            if self._sayings.due(incarnation) is not None:
                logger.exception("worker incarnation %s cannot be recovered", incarnation)

    def recover(
        self, incarnation: str, names: Names | None = None, *, dead: bool = False
    ) -> int | None:
        """Take over `incarnation` if its lease has run out (or it is known to be `dead`).

        `names`: those of the protocol version that it spoke. Attempts are counted in this worker's
        own version. Returns how many requests went back to their queues; None: another worker
        recovers it.
        """
        names = names or self._names
        attempts = self._names.attempts("")
        granted = self._revoke(
            keys=[names.leases, names.fence(incarnation), names.running(incarnation)],
            args=[incarnation, RECOVERY_LEASE_MS, attempts, int(dead), ATTEMPTS_TTL_S],
        )
        if not granted:
            return None
        # kill point: recovery-granted
        self._accuse(incarnation, names)
        # kill point: recovery-accused
        given = give_back(self._client, names, incarnation, self._wrong_types)
        moved = given.moved
        # kill point: recovery-moved
        if not given.left:  # else its lease stays, and runs out again
            self._client.delete(names.stats(incarnation))
            self._client.zrem(names.leases, incarnation)
        if moved:
            told = about(requests=moved, incarnation=incarnation)
            logger.warning(
                "recovered %d requests of worker incarnation %s", moved, incarnation, extra=told
            )
        return moved

    def _accuse(self, incarnation: str, names: Names) -> None:
        """Count an attempt for each message that was claimed and not decoded when the worker died.

        Only once for each message: from then on it is decoded alone, as a member of running:<i>, so
        that further attempts are counted only for the one that ends its worker (by revoke.lua).
        """
        held: dict[bytes, bytes] = {}
        try:
            held = self._client.hgetall(names.claims(incarnation))  # type: ignore[assignment]
        except RedisError as problem:
            if not is_wrong_type(problem):
                raise
        for field, decoded in held.items():
            if decoded != b"0":
                continue
            try:
                claim = names.parse_claim(field.decode())
                messages = self._client.lrange(field, 0, -1)
            except (ValueError, redis.ResponseError):
                continue  # `give_back` reports it
            attempts = self._names.attempts(claim.model)
            counted: list[Command] = [
                ("HSETNX", attempts, decoding_field(message), 1)
                for message in messages
                if isinstance(message, bytes) and message
            ]
            expiry: Command = ("EXPIRE", attempts, ATTEMPTS_TTL_S)
            replies = attempted(self._client, names, [*counted, expiry])
            if any(isinstance(reply, Exception) for reply in replies):
                kind = type_of(self._client, attempts)
                self._wrong_types.report(attempts, kind, HASH, NO_ATTEMPTS)
