"""What a dead worker held goes back to the queues it came from, in the order it had there.

Any worker recovers any other. `give_back` is also how a worker that stops hands back its own.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time

import redis
from redis.exceptions import RedisError

from inferq.shared.lua import source
from inferq.shared.names import ClaimName, Names
from inferq.shared.resp import Command
from inferq.workers.full import pipelined
from inferq.workers.logs.fields import about

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


def suspect(message: bytes) -> str:
    """The field of attempts:<m> that counts deaths while decoding these bytes."""
    return f"#{hashlib.sha1(message, usedforsecurity=False).hexdigest()}"


def give_back(client: redis.Redis, names: Names, incarnation: str) -> int:
    """Move all that `incarnation` holds back to its queues; return how many requests.

    Newest claim first and, within a claim, newest request first, each to the queue's right end:
    so the oldest comes to stand where the next claim takes it. The fence must be gone already.
    """
    held: dict[bytes, bytes] = client.hgetall(names.claims(incarnation))  # type: ignore[assignment]
    claims = sorted(
        (names.parse_claim(key.decode()) for key in held), key=lambda c: c.number, reverse=True
    )
    moved = 0
    for claim in claims:
        key = names.claim(claim.incarnation, claim.number, claim.model, claim.step)
        moved += _move(client, names, claim, key)
        # kill point: giveback-claim-moved
        client.hdel(names.claims(incarnation), key)
    return moved


def _move(client: redis.Redis, names: Names, claim: ClaimName, key: str) -> int:
    client.lrem(key, 0, b"")  # type: ignore[arg-type]
    queue = names.queue(claim.model, claim.step)
    moved = 0
    moves: list[Command] = [("LMOVE", key, queue, "LEFT", "RIGHT")] * _MOVES_PER_TRIP
    while True:
        got = sum(item is not None for item in pipelined(client, names, moves))
        moved += got
        if got < _MOVES_PER_TRIP:
            return moved
        # kill point: giveback-between-moves


class Recoverer:
    """The thread that watches everybody's leases.

    It acts only after its own connection was up for one whole lease: a Redis that was away must
    not make everybody's lease look expired before they could renew.
    """

    def __init__(self, client: redis.Redis, names: Names, lease_s: float) -> None:
        self._client = client
        self._names = names
        self._lease_s = lease_s
        self._expired = client.register_script(source("expired"))
        self._revoke = client.register_script(source("revoke"))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inferq-recovery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        up_since: float | None = None
        while not self._stop.wait(SCAN_EVERY_S):
            try:
                if up_since is None:
                    self._client.ping()
                    up_since = time.monotonic()
                for names in self._names.spoken():
                    expired = self._expired(keys=[names.leases], args=[100])
                    if time.monotonic() - up_since >= self._lease_s:
                        for incarnation in expired:
                            self._try(incarnation.decode(), names)
            except RedisError as problem:
                up_since = None
                logger.warning("recovery: %s", problem)

    def _try(self, incarnation: str, names: Names) -> None:
        try:
            self.recover(incarnation, names)
        except (redis.ConnectionError, redis.TimeoutError):
            raise
        except Exception:  # what one left behind must not keep the others from being recovered
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
        moved = give_back(self._client, names, incarnation)
        # kill point: recovery-moved
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
        held: dict[bytes, bytes] = self._client.hgetall(names.claims(incarnation))  # type: ignore[assignment]
        for key, decoded in held.items():
            if decoded != b"0":
                continue
            attempts = self._names.attempts(names.parse_claim(key.decode()).model)
            messages: list[bytes] = self._client.lrange(key, 0, -1)  # type: ignore[assignment]
            counted: list[Command] = [
                ("HSETNX", attempts, suspect(message), 1) for message in messages if message
            ]
            expiry: Command = ("EXPIRE", attempts, ATTEMPTS_TTL_S)
            pipelined(self._client, names, [*counted, expiry])
