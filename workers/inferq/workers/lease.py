"""A worker incarnation's lease: born, renewed by a thread and a connection of its own, given up."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping

import redis
from redis.exceptions import RedisError

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.shared.resp import Command
from inferq.workers.clock import RedisClock
from inferq.workers.full import pipelined

logger = logging.getLogger(__name__)

#: How long an announcement outlives its last refresh: a model whose workers are all away stays
#: known for a day, so that requests for it are queued and not refused.
ADVERT_TTL_S = 24 * 3600
ADVERT_EVERY_S = 60.0
#: Seconds after which renewing is tried again if it failed: others wait for one lease only, once
#: Redis is back, before they take those that are not renewed for dead.
RETRY_S = 0.5


class Lease:
    """Keeps this process's right to settle alive, and announces the models it serves.

    Its incarnations begin with `prefix`. `adverts` maps models to their encoded announcement.
    `may_renew` is asked each time: False (a batch exceeded max_run_seconds) lets the lease run out.
    `on_lost` is called from the renewing thread when the fence is found gone.
    """

    def __init__(
        self,
        client: redis.Redis,
        names: Names,
        clock: RedisClock,
        *,
        prefix: str,
        lease_s: float,
        adverts: Mapping[str, bytes],
        may_renew: Callable[[], bool],
        on_lost: Callable[[], None],
    ) -> None:
        self._client = client
        self._names = names
        self._clock = clock
        self._prefix = prefix
        self._lease_s = lease_s
        self._adverts = adverts
        self._may_renew = may_renew
        self._on_lost = on_lost
        self._renew = client.register_script(source("renew"))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inferq-lease", daemon=True)
        self._announced = 0.0
        self.incarnation = ""

    def start(self) -> None:
        """Birth, and the thread that renews from then on. Raises redis errors."""
        self.be_born()
        self._thread.start()

    def be_born(self) -> None:
        """A fresh incarnation, with a fence and a lease. Raises redis errors.

        What it serves is announced first: whom a client finds serving a model, it can ask about it.
        """
        self._announce()
        # kill point: announced-unborn
        incarnation, before = self._prefix + secrets.token_hex(8), self.incarnation
        asked = time.monotonic()
        args = [*self._args(incarnation), 1, before]
        _, stamp = self._renew(keys=self._keys(incarnation), args=args)
        self._clock.set(float(stamp), asked)
        # kill point: born
        self.incarnation = incarnation

    def _keys(self, incarnation: str) -> list[str]:
        names = self._names
        return [
            names.fence(incarnation), names.leases,
            *(each.serving(model) for each in names.spoken() for model in self._adverts),
        ]  # fmt: skip

    def _args(self, incarnation: str) -> list[str | int]:
        return [incarnation, int(self._lease_s * 1000)]

    def _announce(self) -> None:
        adverts: list[Command] = [
            ("SET", names.model(model), advert, "EX", ADVERT_TTL_S)
            for names in self._names.spoken()
            for model, advert in self._adverts.items()
        ]
        pipelined(self._client, self._names, adverts)
        self._announced = time.monotonic()

    def _run(self) -> None:
        pause = self._lease_s / 3
        while not self._stop.wait(pause):
            pause = self._lease_s / 3
            if not self._may_renew():
                logger.critical("a batch exceeds max_run_seconds: the lease is no longer renewed")
                continue
            try:
                self._renew_once()
            except RedisError as problem:
                pause = min(pause, RETRY_S)
                logger.warning("the lease could not be renewed: %s", problem)

    def _renew_once(self) -> None:
        asked = time.monotonic()
        incarnation = self.incarnation
        alive, stamp = self._renew(keys=self._keys(incarnation), args=self._args(incarnation))
        self._clock.set(float(stamp), asked)
        if not alive and incarnation == self.incarnation:
            self._on_lost()
        elif time.monotonic() - self._announced > ADVERT_EVERY_S:
            self._announce()

    def stop(self) -> None:
        """Stop renewing. What is still held must have been settled or given back before."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def retire(self) -> None:
        """The end of an incarnation that holds nothing: drop its fence and its lease."""
        names, i = self._names, self.incarnation
        with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(names.fence(i), names.running(i), names.claims(i))
            pipe.zrem(names.leases, i)
            for each in names.spoken():
                for model in self._adverts:
                    pipe.zrem(each.serving(model), i)
            pipe.execute()
