"""Checks the Celery workers on models' queues: a stock worker drops requests that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from inferq.shared.celery_app import make_app
from inferq.shared.connect import redis_client
from inferq.shared.names import model_of
from inferq.shared.settings import Settings
from inferq.workers.control_plane import kombu_guard
from inferq.workers.doctor.finding import Finding, error, ok, warning
from inferq.workers.metrics.published import read_stats
from inferq.workers.models.not_served import listed

#: Seconds that workers have to answer.
ANSWER_S: Final = 1.0


def workers(settings: Settings) -> Iterator[Finding]:
    """One line for each worker on a model's queue. Raises kombu's and redis' errors."""
    app = make_app(settings)
    kombu_guard.install()
    try:
        inspect = app.control.inspect(timeout=ANSWER_S)
        consumed: dict[str, list[dict[str, Any]]] = inspect.active_queues() or {}
        ours = {node: models for node, queues in consumed.items() if (models := _models(queues))}
        if not ours:
            yield from _silent(settings)
            return
        stats = app.control.inspect(destination=list(ours), timeout=ANSWER_S).stats() or {}
    finally:
        app.close()
    for node, models in sorted(ours.items()):
        told = stats.get(node)
        listed = ", ".join(models)
        if told is None:
            yield warning(
                f"worker {node}",
                f"consumes {listed}, and did not say what it is",
                f"ask again: celery -A inferq.workers.app inspect stats -d {node}",
            )
        elif "inferq_models" not in told:
            queues = ",".join(f"inferq.{model}" for model in models)
            yield error(
                f"worker {node}",
                f"a stock Celery worker takes the requests of {listed} and drops "
                "them: it has no task inferq.infer",
                f"stop it, or start it without -Q {queues}; celery -A inferq.workers.app serves",
            )
        else:
            found = f"{told.get('inferq_state', 'serving')} {told['inferq_models']}"
            yield _serving(node, found, str(told.get("inferq_not_served") or ""))


def _serving(node: str, found: str, missing: str) -> Finding:
    """A worker of inferq that serves `found`, and does not serve `missing`."""
    if not missing:
        return ok(f"worker {node}", found)
    return warning(
        f"worker {node}", f"{found}; not served: {missing}", "mend it, then start the worker again"
    )


def _silent(settings: Settings) -> Iterator[Finding]:
    """Findings if no worker answers: those without remote control are known by their stats."""
    with redis_client(settings.redis_url, sentinel_master=settings.sentinel_master) as client:
        published = read_stats(client, settings.names())
    if not published:
        yield warning(
            "workers",
            f"none that answers within {ANSWER_S:g} s consumes a queue of ours",
            "start one: inferq worker --models DIR",
        )
    for worker in published:
        served = ", ".join(f"{model.model}:{model.version}" for model in worker.models)
        yield _serving(
            worker.node,
            f"{worker.state} {served or 'nothing'}, and answers no remote control",
            listed(worker.not_served),
        )
    if published and settings.remote_control:
        yield warning(
            "remote control",
            "no worker answers it",
            "nothing if they were started with INFERQ_REMOTE_CONTROL=0; else see their logs",
        )


def _models(queues: list[dict[str, Any]] | None) -> list[str]:
    names = (model_of(str(queue.get("name", ""))) for queue in queues or ())
    return sorted(name for name in names if name is not None)
