"""A worker's incarnation, seen from the data plane: joins links, is lost, is handed back.

An incarnation holds claims under one lease. It outlives links to Redis. Once its lease is lost,
other workers take over what it held, and this worker goes on as a new incarnation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from itertools import count

import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.workers.claims.fenced import FencedLink
from inferq.workers.claims.lease import Lease
from inferq.workers.claims.ledger import Ledger
from inferq.workers.claims.link import Link
from inferq.workers.claims.recovery import Recoverer
from inferq.workers.claims.wrong_type import WrongTypeReports
from inferq.workers.data_plane.admission import Admission
from inferq.workers.data_plane.held import Held, running
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.settling import Settling
from inferq.workers.logs.fields import about

logger = logging.getLogger(__name__)

#: Seconds before a question that Redis did not answer is repeated.
RETRY_S = 0.2


class Incarnation:
    """The present one. Only `on_lost`, `id` and `run_id` may be used by other threads."""

    def __init__(
        self,
        client: redis.Redis,
        names: Names,
        models: Mapping[str, ServedModel],
        *,
        lease: Lease,
        recoverer: Recoverer,
        held: Held,
        settling: Settling,
        result_expires_s: int,
        reply_timeout_s: float,
    ) -> None:
        self._client = client
        self._names = names
        self._models = models
        self._lease = lease
        self._recoverer = recoverer
        self._held = held
        self._settling = settling
        self._result_expires_s = result_expires_s
        self._reply_timeout_s = reply_timeout_s
        self._claim_numbers = count(1)
        self._settle_numbers = count(1)
        self._wrong_types = WrongTypeReports()
        #: Run id of the Redis that last knew this incarnation and all that it settled; empty: none.
        self.run_id = ""
        #: Whether Redis went back in time and its claims were not read anew since.
        self._went_back = False
        #: Whether the lease's thread found the fence gone.
        self.is_lost = False

    @property
    def id(self) -> str:
        """Its name; empty: it is not registered yet."""
        return self._lease.incarnation

    def on_lost(self) -> None:
        """The lease's thread found the fence gone, and calls this."""
        self.is_lost = True

    def ledger(self, link: Link) -> Ledger:
        """This incarnation's claims on a new link."""
        return Ledger(
            FencedLink(link, self._names, self.id, list(self._models), self._wrong_types),
            self._names,
            self.id,
            numbers=self._claim_numbers,
            settles=self._settle_numbers,
            result_ttl_s=self._result_expires_s,
        )

    def catch_up(self, link: Link, ledger: Ledger, admission: Admission) -> None:
        """Take over from earlier links: find out what became of what was sent on them.

        If Redis went back in time, the kept results are stored again first. Then each request that
        Redis holds for this incarnation is taken on, unless it still waits, computes or is being
        settled here. It is acknowledged if it has a result, and computed once more if not.
        """
        settling, claims = self._settling, self._held.claims
        ledger.link.take_over()
        ledger.link.arm()
        if link.run_id != self.run_id:
            settling.publish_again()
        if settling.is_ahead_of(ledger):
            self._went_back = True
        if self._went_back:
            ledger.unmark_all()
        self.mark_all(ledger)
        settling.store_again(ledger)
        models = frozenset(self._models)
        if self._went_back:
            for claimed in ledger.records.unsettled(claims, {done.slot for done in settling.due}):
                admission.take_on([claimed], models)
            self._went_back = False
        for claimed in ledger.records.adopt(claims):
            admission.take_on([claimed], models)
        settling.settled_multis.last = ledger.link.settles_known
        self.run_id = link.run_id

    def mark_all(self, ledger: Ledger) -> None:
        """Mark in Redis all that is held: which requests compute, and which claims were decoded."""
        held = self._held
        ledger.mark(running(held.in_batches()), list(held.claims.values()))

    def begin_anew(self, *, forgotten: bool) -> None:
        """Another worker took over what this incarnation held: drop it all and register a new one.

        `forgotten`: Redis was restarted, and may have gone back to before this incarnation existed.
        """
        lost, ids = self.id, self._held.request_ids()
        told = about(*ids, requests=len(ids), incarnation=lost)
        logger.error("the lease of %s is lost; its results are discarded", lost, extra=told)
        self._settling.drop(forgotten=forgotten)
        self._went_back = False
        self._held.drop()
        try:
            self._client.delete(self._names.running(lost))
            self._lease.register()
            self.is_lost = False
        except RedisError as problem:
            logger.warning("no new lease yet: %s", problem)
            time.sleep(RETRY_S)

    def hand_back(self, until: float, *, blame: bool) -> None:
        """Put everything that is still held back into its queues, and give up the lease.

        It is tried until `until` (monotonic s), and a little longer. `blame`: requests that compute
        may have ended this worker, and an attempt is counted for each.
        """
        for model in self._models.values():
            model.recall()  # else lanes would still begin what others are about to compute
        incarnation = self.id
        ids = self._held.request_ids()
        deadline = max(until, time.monotonic()) + self._reply_timeout_s
        while True:
            try:
                self._lease.stop()
                if not blame:
                    self._client.delete(self._names.running(incarnation))
                # kill point: handback-begun
                moved = self._recoverer.recover(incarnation, dead=True) or 0
                # kill point: handback-unretired
                self._lease.retire()
                told = about(*ids[:moved], requests=moved, incarnation=incarnation)
                logger.info("handed back what was held: %d requests", moved, extra=told)
                return
            except RedisError as problem:
                if time.monotonic() > deadline:
                    logger.error(
                        "claims were not handed back, other workers will recover them: %s", problem
                    )
                    return
                time.sleep(RETRY_S)
