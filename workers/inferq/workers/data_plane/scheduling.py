"""What a worker takes on next, over all its models: which batches start, what is claimed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from inferq.workers.claims.claim import Want
from inferq.workers.claims.fenced import HINT, QueueId
from inferq.workers.claims.runs import Job
from inferq.workers.data_plane.budget import Budget
from inferq.workers.data_plane.served_model import ServedModel


def next_batches(
    models: Collection[ServedModel], now_mono_ms: float
) -> list[tuple[ServedModel, Job]]:
    """The batches that leave now. `now_mono_ms`: of the monotonic clock.

    A suspect computes while nothing else does, on no lane of any model, and no audit either: should
    it end this process once more, nobody else is blamed, nor is it blamed for others.
    """
    suspect = next((model for model in models if model.is_suspect_first()), None)
    if suspect is not None:
        audited = [model.audit.hold() for model in models]
        busy = any(audited) or any(model.jobs for model in models)
        return [] if busy else [(suspect, suspect.form_alone())]
    if any(job.items[0].alone for model in models for job in model.jobs):
        return []
    for model in models:
        if model.audit.held:
            model.audit.release()
    return [(model, job) for model in models if model.waiting for job in model.form(now_mono_ms)]


def wants(
    models: Collection[ServedModel],
    depths: Mapping[QueueId, int | None],
    ending: int,
    budget: Budget,
) -> tuple[list[Want], list[QueueId]]:
    """What to claim, and the queues to hear of since there is room beyond that.

    `depths`: see Ledger. `ending`: requests that are about to be settled. A model whose lanes are
    amply supplied asks for, and hears of, more urgent requests only. One whose requests are large
    asks for as many as its budget has room for; for one at least, if it holds none as urgent.
    """
    wanted: list[Want] = []
    listen: list[QueueId] = []
    common = budget.common_left()
    for model in models:
        if not model.consuming:
            continue
        asked = 0
        own, each = budget.own_left(model.name), budget.each(model.name)
        most = min((own + common) // each, budget.at_once(model.name))
        has_enough_ahead = model.has_enough_ahead()
        for step, total in model.room().items():
            if has_enough_ahead and step >= model.least_urgent():
                break
            room = min(total, most) - asked
            if room <= 0 < total and not asked and budget.idle(model.name, step):
                room = 1
            depth = depths.get((model.name, step), 0)
            if depth is None:  # as likely as not as many come in as go out
                depth = max(HINT, ending)
            count = min(depth, room)
            if count > 0:
                wanted.append(Want(model.name, step, count))
                asked += count
            if room > count:
                listen.append((model.name, step))
        common -= max(0, asked * each - own)
    return wanted, listen
