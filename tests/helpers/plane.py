"""A data plane in the test's own process, on a real Redis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from helpers.scoped import Scoped
from inferq.shared.codec import encode_advert
from inferq.shared.connect import redis_client
from inferq.shared.names import Names
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.lease import Lease
from inferq.workers.claims.recovery import Recoverer
from inferq.workers.claims.runs import Finished
from inferq.workers.claims.scheduled import ScheduledKeeper
from inferq.workers.claims.settlement import Settlement
from inferq.workers.data_plane.control import Control
from inferq.workers.data_plane.counts import Counts
from inferq.workers.data_plane.loading import LoadingModel
from inferq.workers.data_plane.observers import Observer, Observers
from inferq.workers.data_plane.plane import DataPlane
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.models.repository import load_model

LEASE_S = 10.0


class NoCelery(Control):
    """Stands in for Celery's half, of which a test's requests need nothing."""

    def __init__(self) -> None:
        self.ended = False

    def publish_canvas(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        raise AssertionError("no request of this test has links")

    def hand_over(self, slot: Slot, model: str, message: bytes, handed: bytes) -> Settlement:
        raise AssertionError("no message of this test is for Celery's own handler")

    def end_process(self) -> None:
        self.ended = True


class RunningPlane(Scoped):
    """Serves `models` of the repository `root`; within `with` it has started."""

    def __init__(
        self, url: str, root: Path, models: Sequence[str], observers: Iterable[Observer] = ()
    ) -> None:
        names, clock = Names(), RedisClock()
        client = redis_client(url)
        self.control = NoCelery()
        loading = [LoadingModel(load_model(root, name)) for name in models]
        counts = Counts({model.name: model.counts for model in loading})
        told = Observers([*observers, counts])
        self.models: dict[str, ServedModel] = {
            model.name: model.load(
                "worker",
                names,
                clock,
                is_revoked=lambda _: False,
                on_finished=self._on_finished,
                on_begun=told.started,
                result_expires_s=60,
            )
            for model in loading
        }
        self._lease = Lease(
            client,
            names,
            clock,
            prefix="",
            lease_s=LEASE_S,
            adverts={name: encode_advert(model.advert) for name, model in self.models.items()},
            may_renew=lambda: True,
            on_lost=self._on_lost,
            on_missing=lambda: None,
        )
        self.plane = DataPlane(
            client,
            names,
            clock,
            list(self.models.values()),
            lease=self._lease,
            recoverer=Recoverer(client, names, LEASE_S),
            scheduled=ScheduledKeeper(client, names, clock),
            control=self.control,
            observers=told,
            result_expires_s=60,
            reply_timeout_s=2.0,
        )

    def _begin(self) -> None:
        self._lease.start()
        self.plane.start()

    def _end(self) -> None:
        self.stop()
        for model in self.models.values():
            model.close(10)

    def _on_finished(self, finished: Finished) -> None:
        self.plane.on_finished(finished)

    def _on_lost(self) -> None:
        self.plane.on_lease_lost()

    def stop(self) -> None:
        """Drain it; AssertionError if it does not end."""
        self.plane.drain(10.0)
        assert self.plane.join(20), "the data plane did not end"
