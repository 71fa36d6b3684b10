"""A worker incarnation's lease: registered, renewed by a thread of its own, given up."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.shared.resp import Command
from inferq.workers.claims import replies
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.oom import pipelined
from inferq.workers.claims.wrong_type import NO_ANNOUNCEMENT, ZSET, WrongTypeReports, type_of
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

#: Seconds that an advert is kept after its last refresh. A model without workers stays known for a
#: day, so that requests for it are queued and not refused.
ADVERT_TTL_S = 24 * 3600
ADVERT_EVERY_S = 60.0
#: Seconds after which a failed renewal is tried again. Once Redis is back, other workers wait for
#: one lease only, and then take workers that have not renewed theirs for dead.
RETRY_S = 0.5


class Lease:
    """Renews this process' lease, without which it may not settle, and announces its models.

    The names of its incarnations begin with `prefix`. `adverts` maps models to their encoded
    adverts. `may_renew` is called before each renewal: False (a batch exceeded max_run_seconds)
    lets the lease run out. The renewing thread calls `on_lost` if the fence is gone, and
    `on_missing` if somebody removed the lease itself.
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
        on_missing: Callable[[], None],
    ) -> None:
        self._client = client
        self._names = names
        self._clock = clock
        self._prefix = prefix
        self._lease_s = lease_s
        self._adverts = adverts
        self._may_renew = may_renew
        self._on_lost = on_lost
        self._on_missing = on_missing
        self._wrong_types = WrongTypeReports()
        self._renew = client.register_script(source("renew"))
        # Whatever the error, a renewal is tried again in time; else others take this worker for
        # dead.
        self.loop = Periodic(
            "lease",
            self._turn,
            every_s=lease_s / 3,
            first_s=lease_s / 3,
            retry_s=RETRY_S,
            max_retry_s=RETRY_S,
            failing="the lease could not be renewed",
            logger=logger,
        )
        self._announced = 0.0
        self.incarnation = ""

    def start(self) -> None:
        """Register, and start the thread that renews the lease from then on.

        Raises redis errors.
        """
        self.register()
        self.loop.start()

    def register(self) -> None:
        """Begin a new incarnation, with a fence and a lease. Raises redis errors.

        Its models are announced first: a client that finds a worker for a model also finds the
        advert.
        """
        self._announce()
        # kill point: announced-unborn
        incarnation, before = self._prefix + secrets.token_hex(8), self.incarnation
        asked = time.monotonic()
        args = [*self._args(incarnation), 1, before]
        keys = self._keys(incarnation)
        _, stamp, _, wrong_type = self._renew(keys=keys, args=args)
        self._clock.set(float(stamp), asked)
        self._tell(keys, wrong_type)
        # kill point: born
        self.incarnation = incarnation

    def _keys(self, incarnation: str) -> list[str]:
        names = self._names
        return [
            names.fence(incarnation),
            names.leases,
            *(each.serving(model) for each in names.all_protocols() for model in self._adverts),
        ]

    def _args(self, incarnation: str) -> list[str | int]:
        return [incarnation, int(self._lease_s * 1000)]

    def _announce(self) -> None:
        adverts: list[Command] = [
            ("SET", names.model(model), advert, "EX", ADVERT_TTL_S)
            for names in self._names.all_protocols()
            for model, advert in self._adverts.items()
        ]
        pipelined(self._client, self._names, adverts)
        self._announced = time.monotonic()

    def _turn(self) -> None:
        if self._may_renew():
            self._renew_once()
        else:
            logger.critical("a batch exceeds max_run_seconds: the lease is no longer renewed")

    def _renew_once(self) -> None:
        asked = time.monotonic()
        incarnation = self.incarnation
        keys = self._keys(incarnation)
        alive, stamp, added, wrong_type = self._renew(keys=keys, args=self._args(incarnation))
        self._clock.set(float(stamp), asked)
        if alive and (wrong_type or self._wrong_types):
            self._tell(keys, wrong_type)
        if added:
            self._on_missing()
        if not alive and incarnation == self.incarnation:
            self._on_lost()
        elif time.monotonic() - self._announced > ADVERT_EVERY_S:
            self._announce()

    def _tell(self, keys: Sequence[str], wrong_type: Sequence[int]) -> None:
        """Report each serving:<m> that has or had the wrong type; `wrong_type`: places, from 1.

        The recoverer reports `leases`.
        """
        for place, key in enumerate(keys[2:], 3):
            if place in wrong_type:
                self._wrong_types.report(key, type_of(self._client, key), ZSET, NO_ANNOUNCEMENT)
            else:
                self._wrong_types.resolve(key)

    def stop(self) -> None:
        """Stop renewing. What this worker held must have been settled or given back before."""
        self.loop.stop()

    def retire(self) -> None:
        """The end of an incarnation: drop its fence and, if it holds nothing, its lease.

        Claims whose queue has the wrong type are left. Others recover them once the lease ran out.
        """
        names, i = self._names, self.incarnation
        with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(names.fence(i), names.running(i))
            pipe.exists(names.claims(i))
            for each in names.all_protocols():
                for model in self._adverts:
                    pipe.zrem(each.serving(model), i)
            _, holds, *_ = replies.of_each(pipe)
        if not holds:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.zrem(names.leases, i)
                replies.of_each(pipe)
