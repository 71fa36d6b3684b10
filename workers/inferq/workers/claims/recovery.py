"""What a dead worker held goes back to the queues it came from, in the order it had there.

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
#: Time one recovery has before another worker takes it over, in ms. Two at once do no harm, and a
#: recoverer that dies is to cost so little that what it was about is still back within 15 s.
RECOVERY_LEASE_MS = 3_000
#: How long attempts:<m> is kept after the last death, in seconds: what it knows of requests that
#: never come again must not make their model suspicious for ever.
ATTEMPTS_TTL_S = 24 * 3600
_MOVES_PER_TRIP = 64


def decoding_field(message: bytes) -> str:
    """The field of attempts:<m> that counts deaths while decoding these bytes."""
    return f"#{hashlib.sha1(message, usedforsecurity=False).hexdigest()}"


def linking_field(request_id: str) -> str:
    """The field of attempts:<m> that counts deaths while what follows on it was published."""
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

    Newest claim first and, within a claim, newest request first, each to the queue's right end:
    so the oldest comes to stand where the next claim takes it. The fence must be gone already.
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
                    "key %r is a %s; expected a list, a claim of a dead worker: it stays there",
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
        logger.error("key %r is a %s; expected a hash: the claims are looked for", key, kind)
        fields = list(client.scan_iter(match=f"{glob_of(names.claim_head(incarnation))}*"))
        with client.pipeline(transaction=True) as pipe:
            pipe.unlink(key)
            if fields:  # as it should be: what is not moved now is found there the next time
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
    """The thread that watches everybody's leases.

    It acts only after this Redis was up, and reached, for one whole lease: one that was away, or
    went back in time, must not make everybody's lease look expired before they could renew.
    """

    def __init__(self, client: redis.Redis, names: Names, lease_s: float) -> None:
        self._client = client
        self._names = names
        self._lease_s = lease_s
        self._expired = client.register_script(source("expired"))
        self._revoke = client.register_script(source("revoke"))
        #: The Redis that answers, and since when (monotonic s).
        self._run_id = ""
        self._up_since: float | None = None
        self._wrong_types = WrongTypeReports()
        self._sayings = Sayings()
        #: Protocols whose leases were lost: whoever has a fence or claims is to have one again.
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
        """Somebody removed the leases of all; what a dead worker had held would stay with it."""
        self._lost.add(self._names)

    def _turn(self) -> None:
        try:
            # The client connects anew without a word: a quick restart is told by this alone.
            run_id = self._client.info("server").get("run_id", "?")
            if run_id != self._run_id:
                self._run_id, self._up_since = run_id, time.monotonic()
            for names in self._names.all_protocols():
                self._look(names)
        except RedisError:
            self._run_id, self._up_since = "", None
            raise

    def _look(self, names: Names) -> None:
        """Recover who has an expired lease."""
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
                logger.error("%r in %s is no worker's and is removed", member, names.leases)
                self._client.zrem(names.leases, member)
            else:
                self._try(incarnation, names)

    def _lease_again(self, names: Names) -> None:
        """Let all that have a fence or claims have a lease; who lives renews it."""
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
        except Exception:  # what one left behind must not keep the others from being recovered
            if self._sayings.due(incarnation) is not None:
                logger.exception("worker incarnation %s cannot be recovered", incarnation)

    def recover(
        self, incarnation: str, names: Names | None = None, *, dead: bool = False
    ) -> int | None:
        """Take over `incarnation` if its lease has run out (or it is known to be `dead`).

        `names`: those of the protocol that it spoke. Attempts are counted in this worker's own.
        Returns how many requests went back to their queues, or None if it was not ours to do.
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
        """Note what was claimed and not decoded yet when the worker died.

        Once, however often: from then on each is decoded by itself, as a member of running:<i>, so
        that only the culprit is counted on (by revoke.lua).
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
                continue  # `give_back` tells of it
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
