"""Decides what a worker takes on next, over all models: which batches start, what is claimed."""

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
    """The batches that leave now. `now_mono_ms`: monotonic clock.

    A suspect runs while no lane of any model computes and no audit runs. So if the process ends
    once more, an attempt is counted for no other request, and the suspect gets none because of
    others.
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
    """What to claim, and the queues to listen to, since there is room for even more.

    `depths`: see FencedLink. `ending`: requests that are about to be settled. A model whose lanes
    have enough batches queued claims, and listens for, more urgent requests only. A model with
    large requests claims as many as its budget has room for; at least one, if it holds none as
    urgent.
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
            if depth is None:  # not looked at: assume that as many come in as go out
                depth = max(HINT, ending)
            count = min(depth, room)
            if count > 0:
                wanted.append(Want(model.name, step, count))
                asked += count
            if room > count:
                listen.append((model.name, step))
        common -= max(0, asked * each - own)
    return wanted, listen
