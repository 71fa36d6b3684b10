"""Remote control commands that include what the data plane holds, beside Celery's own tasks.

Celery iterates live sets in ``inspect active`` and similar commands. These answer from snapshots,
since the data plane's thread changes what it holds all the time. Commands that make no sense for a
worker of inferq answer why.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from celery.worker import control as stock
from celery.worker.control import Panel

from inferq.shared.names import TASK, model_of, queue_of
from inferq.workers.batching.waiting import Waiting
from inferq.workers.control_plane import celery_private
from inferq.workers.control_plane.revokes import MAX_REVOKED, Revokes, TooMany, newest
from inferq.workers.control_plane.service import Service

logger = logging.getLogger(__name__)

Answer = Callable[..., Any]


def _service(state: Any) -> Service | None:
    service: Service | None = getattr(state.consumer.controller, "inferq", None)
    return service


def _computing(state: Any) -> Iterator[dict[str, Any]]:
    service = _service(state)
    for model in service.models if service else ():
        for job, began_ms in model.computing():
            began = time.time() - (time.monotonic() - began_ms / 1000)
            for item in job.items:
                yield _info(state, item, began)


def _waiting(state: Any) -> Iterator[dict[str, Any]]:
    service = _service(state)
    for model in service.models if service else ():
        for item in model.reserved():
            yield _info(state, item, None)


def _info(state: Any, item: Waiting, time_start: float | None) -> dict[str, Any]:
    ticket = item.ticket
    return {
        "id": ticket.id, "name": TASK, "type": TASK, "args": "()", "kwargs": ticket.kwargsrepr,
        "hostname": state.hostname, "time_start": time_start, "acknowledged": False,
        "delivery_info": {
            "exchange": "", "routing_key": queue_of(ticket.model), "priority": ticket.priority,
            "redelivered": ticket.attempts > 0,
        },
        "worker_pid": os.getpid(),
    }  # fmt: skip


@Panel.register(type="inspect", name="active", alias="dump_active")  # type: ignore[untyped-decorator]
def active(state: Any, **options: Any) -> list[dict[str, Any]]:
    """List of requests that are being computed, and of tasks being executed."""
    return [*_active(state, **options), *_computing(state)]


@Panel.register(type="inspect", name="reserved", alias="dump_reserved")  # type: ignore[untyped-decorator]
def reserved(state: Any, **options: Any) -> list[dict[str, Any]]:
    """List of requests that are claimed and wait for a lane, and of reserved tasks."""
    return [*_reserved(state, **options), *_waiting(state)]


@Panel.register(  # type: ignore[untyped-decorator]
    type="inspect", name="query_task", variadic="ids", signature="[id1 [id2 [... [idN]]]]"
)
def query_task(state: Any, ids: Any, **options: Any) -> dict[str, Any]:
    """Query for task information by id."""
    wanted = {ids} if isinstance(ids, str) else set(ids)
    found: dict[str, Any] = dict(_query_task(state, ids, **options))
    for status, infos in (("active", _computing(state)), ("reserved", _waiting(state))):
        found.update({info["id"]: (status, info) for info in infos if info["id"] in wanted})
    return found


@Panel.register(type="inspect", name="active_queues")  # type: ignore[untyped-decorator]
def active_queues(state: Any) -> list[dict[str, Any]]:
    """List the task queues a worker is currently consuming from."""
    service = _service(state)
    ours = service.active_queues() if service else []
    return [*_active_queues(state), *(dict(queue.as_dict(recurse=True)) for queue in ours)]


@Panel.register(  # type: ignore[untyped-decorator]
    type="control",
    name="add_consumer",
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)
def add_consumer(
    state: Any,
    queue: str,
    exchange: Any = None,
    exchange_type: Any = None,
    routing_key: Any = None,
    **options: Any,
) -> Any:
    """Tell worker(s) to consume from task queue by name."""
    if not isinstance(queue, str):
        return stock.nok(f"queue is a {type(queue).__name__}; expected its name")
    service = _service(state)
    if service is not None and service.consume(queue, True):
        return stock.ok(f"add consumer {queue}")
    if model_of(queue) is not None:
        return stock.nok(f"queue {queue}: its model is not loaded here; start a worker with -Q")
    if {exchange, routing_key} - {None, "", queue} or exchange_type not in {None, "", "direct"}:
        return stock.nok("expected a queue alone, which is its own exchange and routing key")
    problem = "it is not up" if service is None else service.why_not_consume(queue)
    if problem is not None:
        return stock.nok(f"queue {queue[:200]!r}: {problem}")
    state.consumer.call_soon(_consume, state.consumer, queue)
    return stock.ok(f"add consumer {queue}")


def _consume(consumer: Any, queue: str) -> None:
    """Consume in Celery's event loop; an exception here would end that loop."""
    try:
        consumer.add_task_queue(queue)
    except consumer.connection_errors:
        raise
    except Exception:
        logger.exception("queue %r cannot be consumed", queue)
        consumer.app.amqp.queues.deselect(queue)


@Panel.register(  # type: ignore[untyped-decorator]
    type="control", name="cancel_consumer", args=[("queue", str)], signature="<queue>"
)
def cancel_consumer(state: Any, queue: str, **options: Any) -> Any:
    """Tell worker(s) to stop consuming from task queue by name."""
    service = _service(state)
    if service is not None and isinstance(queue, str) and service.consume(queue, False):
        return stock.ok(f"no longer consuming from {queue}")
    if queue not in [each["name"] for each in _active_queues(state)]:
        return stock.nok(f"queue {str(queue)[:200]!r} is not consumed here")
    return _cancel_consumer(state, queue)


@Panel.register(  # type: ignore[untyped-decorator]
    type="control", name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]"
)
def revoke(state: Any, task_id: Any, **options: Any) -> Any:
    """Revoke task by task id (or list of ids).

    Stock Celery stores REVOKED at once, in the worker's own serialiser, which the request's client
    may not read. The data plane answers when the request's turn comes, in the request's serialiser.
    Nothing that runs is ended, whatever `terminate` says: all requests share the process.
    """
    try:
        ids = _revokes.add(task_id)
    except (TooMany, TypeError) as problem:
        logger.warning("a revoke is refused: %s", problem)
        return stock.nok(str(problem))
    celerys = [each for each in ids if celery_private.is_held(each)]
    if celerys:
        return _revoke(state, celerys)
    return stock.ok(f"tasks {ids} flagged as revoked")


@Panel.register(  # type: ignore[untyped-decorator]
    type="control",
    name="terminate",
    variadic="task_id",
    args=[("signal", str)],
    signature="<signal> [id1 [id2 [... [idN]]]]",
)
def terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> Any:
    """Revoke task by task id (or list of ids); what runs already is finished."""
    return revoke(state, task_id)


@Panel.register(type="inspect", name="hello", visible=False)  # type: ignore[untyped-decorator]
def hello(state: Any, from_node: Any, revoked: Any = None, **options: Any) -> Any:
    """Request mingle sync-data."""
    if from_node == state.hostname:
        return None
    logger.info("mingle: %r starts", str(from_node)[:100])
    try:
        _revokes.add(list(revoked or ())[-MAX_REVOKED:])
    except (TooMany, TypeError) as problem:
        logger.warning("what it tells is revoked is passed over: %s", problem)
    return {"revoked": newest(), "clock": state.app.clock.forward()}


@Panel.register(  # type: ignore[untyped-decorator]
    type="control",
    name="rate_limit",
    args=[("task_name", str), ("rate_limit", str)],
    signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
)
def rate_limit(state: Any, task_name: Any, rate_limit: Any, **options: Any) -> Any:
    """Tell worker(s) to modify the rate limit for a task by type."""
    if not isinstance(task_name, str) or not isinstance(rate_limit, str | int | None):
        return stock.nok("expected a task's name and a rate such as 5/s")
    if task_name == TASK:
        return stock.nok("requests have no rate limit; see max_queue_depth")
    if task_name not in state.app.tasks:
        return stock.nok("unknown task")
    return _rate_limit(state, task_name, rate_limit)


@Panel.register(  # type: ignore[untyped-decorator]
    type="control",
    name="time_limit",
    args=[("task_name", str), ("soft", float), ("hard", float)],
    signature="<task_name> <soft_secs> [hard_secs]",
)
def time_limit(state: Any, *args: Any, **options: Any) -> Any:
    """Tell worker(s) to modify the time limit for task by type."""
    return stock.nok("the solo pool has no time limits; a request has max_run_seconds")


@Panel.register(type="control", name="shutdown")  # type: ignore[untyped-decorator]
def shutdown(state: Any, msg: Any = None, **options: Any) -> Any:
    """Shutdown worker(s). `inferq worker` starts anew, unless --allow-remote-shutdown."""
    logger.warning("told by remote control to shut down")
    service = _service(state)
    celery_private.stop_worker(service.status_of_shutdown if service is not None else 0)


def _refuse(name: str, why: str, kind: str = "control") -> None:
    """Make the command answer `why` workers of inferq do not offer it."""

    def refused(state: Any, *args: Any, **options: Any) -> Any:
        return stock.nok(f"{name}: {why}")

    refused.__doc__ = f"Not of a worker of inferq: {why}."
    Panel.register(type=kind, name=name)(refused)


for _name in ("pool_grow", "pool_shrink", "pool_restart", "autoscale"):
    _refuse(_name, "each worker is one process; start more workers")
for _name in ("objgraph", "memsample", "memdump"):
    _refuse(_name, "debugging commands are not offered", "inspect")
_refuse("election", "workers hold none, there is no gossip")
_refuse("revoke_by_stamped_headers", "requests are revoked by their ids alone")


@Panel.register(type="control", name="disable_events")  # type: ignore[untyped-decorator]
def disable_events(state: Any) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    celery_private.name_event_groups(state.consumer)
    return _disable_events(state)


_revokes = Revokes()
_active: Answer = stock.active
_reserved: Answer = stock.reserved
_query_task: Answer = stock.query_task
_active_queues: Answer = stock.active_queues
_cancel_consumer: Answer = stock.cancel_consumer
_revoke: Answer = stock.revoke
_rate_limit: Answer = stock.rate_limit
_disable_events: Answer = stock.disable_events
