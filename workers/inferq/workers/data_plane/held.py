"""What a worker holds: its claims, and their requests that no lane has got yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Claim
from inferq.workers.claims.runs import Job
from inferq.workers.data_plane.budget import Budget
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.unfetched import Backlog


def running(items: Iterable[Waiting]) -> list[str]:
    """The members of running:<i> for `items`."""
    return [f"{item.ticket.model}/{item.ticket.id}" for item in items]


class Held:
    """Owned by the data plane's thread. Requests that wait for lanes are in `models`."""

    def __init__(self, models: Mapping[str, ServedModel], budget: Budget) -> None:
        self._models = models
        self.budget = budget
        #: By key.
        self.claims: dict[str, Claim] = {}
        #: Claims that were decoded and not marked so in Redis yet.
        self.decoded: list[Claim] = []
        self.unfetched = Backlog()
        #: Batches that were formed and are not with the lanes yet.
        self.leaving: list[tuple[ServedModel, Job]] = []
        #: Requests since the start.
        self.requests_claimed = 0

    def settled(self, claims: Iterable[Claim]) -> None:
        """Note that requests of these claims were settled."""
        for claim in claims:
            self.budget.settled(claim)
            if claim.complete:
                self.claims.pop(claim.key, None)

    def in_batches(self) -> list[Waiting]:
        """The requests in batches that have not ended.

        Batches that a lost incarnation had begun are left out: they are not this one's.
        """
        jobs = [job for model in self._models.values() for job in model.jobs]
        return [item for job in jobs for item in job.items if item.slot.claim.key in self.claims]

    def request_ids(self) -> list[str]:
        """The ids of the requests that wait or compute."""
        models = self._models.values()
        jobs = [item for model in models for job in model.jobs for item in job.items]
        waiting = [item for model in models for item in model.waiting.items]
        unfetched = [each.opened.ticket.id for each in self.unfetched]
        return [*(item.ticket.id for item in (*jobs, *waiting)), *unfetched]

    def drop(self) -> None:
        """Forget everything: it belongs to another worker now."""
        self.claims.clear()
        self.budget.clear()
        self.unfetched.clear()
        self.decoded.clear()
        for model, job in self.leaving:
            model.ended(job)
        self.leaving.clear()
        for model in self._models.values():
            model.recall()
            model.waiting.clear()
