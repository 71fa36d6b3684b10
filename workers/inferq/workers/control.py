"""Remote control that tells the truth: what Celery's panel shows, plus what the data plane holds.

Celery iterates live sets in ``inspect active`` and its like; ours answers from snapshots, since the
data plane's thread changes what it holds all the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from celery.worker import control as stock
from celery.worker.control import Panel

from inferq.shared.names import TASK, model_of, queue_of
from inferq.workers import celery_private
from inferq.workers.batching.waiting import Waiting
from inferq.workers.service import Service

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
    type="control", name="add_consumer",
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)  # fmt: skip
def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> Any:
    """Tell worker(s) to consume from task queue by name."""
    service = _service(state)
    if service is not None and service.consume(queue, True):
        return stock.ok(f"add consumer {queue}")
    if model_of(queue) is not None:
        return stock.nok(f"queue {queue}: its model is not loaded here; start a worker with -Q")
    return _add_consumer(state, queue, *args, **options)


@Panel.register(  # type: ignore[untyped-decorator]
    type="control", name="cancel_consumer", args=[("queue", str)], signature="<queue>"
)
def cancel_consumer(state: Any, queue: str, **options: Any) -> Any:
    """Tell worker(s) to stop consuming from task queue by name."""
    service = _service(state)
    if service is not None and service.consume(queue, False):
        return stock.ok(f"no longer consuming from {queue}")
    return _cancel_consumer(state, queue, **options)


@Panel.register(  # type: ignore[untyped-decorator]
    type="control", name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]"
)
def revoke(state: Any, task_id: Any, *args: Any, **options: Any) -> Any:
    """Revoke task by task id (or list of ids).

    Stock Celery stores REVOKED at once, in the worker's own serialiser, which the client of a
    request may not read. The data plane answers when its turn comes, in the request's.
    """
    ids = {task_id} if isinstance(task_id, str) else set(task_id or ())
    celerys = {each for each in ids if celery_private.is_held(each)}
    celery_private.flag_revoked(ids)
    if celerys:
        return _revoke(state, sorted(celerys), *args, **options)
    return stock.ok(f"tasks {sorted(ids)} flagged as revoked")


@Panel.register(type="control", name="disable_events")  # type: ignore[untyped-decorator]
def disable_events(state: Any) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    celery_private.name_event_groups(state.consumer)
    return _disable_events(state)


_active: Answer = stock.active
_reserved: Answer = stock.reserved
_query_task: Answer = stock.query_task
_active_queues: Answer = stock.active_queues
_add_consumer: Answer = stock.add_consumer
_cancel_consumer: Answer = stock.cancel_consumer
_revoke: Answer = stock.revoke
_disable_events: Answer = stock.disable_events
