"""What inferq uses of Celery 5.7 and kombu 5.7 beyond their public interface, except canvas.

tests/integration/test_celery_private.py fails when an upgrade changes any of this.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
import pybase64
from celery import Celery
from celery.apps import worker as worker_program
from celery.events.event import EVENT_EXCHANGE_NAME
from celery.utils import imports
from celery.worker import WorkController
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from kombu import serialization
from kombu.exceptions import MessageStateError

from inferq.shared import codec
from inferq.shared.resp import Command
from inferq.workers.logs.fields import about

logger = logging.getLogger(__name__)

#: kombu's bookkeeping of delivered messages (kombu.transport.redis.Channel).
UNACKED = "unacked"
UNACKED_INDEX = "unacked_index"


def is_revoked(request_id: str) -> bool:
    """Whether ``app.control.revoke`` named this id. Safe from any thread."""
    return request_id in worker_state.revoked


def is_held(task_id: str) -> bool:
    """Whether Celery's own handler holds a task of this id."""
    return task_id in worker_state.requests


def is_executing() -> bool:
    """Whether Celery's own handler executes a task, in the main thread."""
    return bool(worker_state.active_requests)


def count_tasks(task: str, count: int) -> None:
    """Add to the totals that ``celery inspect stats`` and heartbeats tell."""
    worker_state.total_count[task] += count
    worker_state.all_total_count[0] += count


def selected_queues(app: Celery) -> list[str] | None:
    """The queues given by ``-Q``; None without ``-Q``."""
    selected = app.amqp.queues._consume_from
    return None if not selected else list(selected)


def hear_no_others(worker: WorkController, remote_control: bool) -> None:
    """Make a worker ignore other workers' events and, without remote control, ask them nothing.

    Gossip keeps Celery's logical clocks in step, which nothing here uses.
    """
    worker.options["without_gossip"] = True
    if not remote_control:
        worker.options["without_mingle"] = True


def is_solo(pool_cls: object) -> bool:
    """Whether a worker's resolved pool class is the solo pool."""
    return getattr(pool_cls, "__module__", "") == "celery.concurrency.solo"


def keep_out_working_directory() -> None:
    """Keep Celery from importing modules from the working directory in this process."""
    imports.cwd_in_path = nullcontext


def asks_for_prefork(arguments: Sequence[str]) -> bool:
    """Whether a command line names prefork, by which Celery means "as the app is configured"."""
    joined = "\0".join(arguments)
    return any(f"{option}prefork" in joined for option in ("-P", "-P\0", "--pool=", "--pool\0"))


def stop_worker(exitcode: int) -> None:
    """Ask Celery's main loop to end the worker process, with this status.

    It is a warm shutdown: a cold one would always end with status 0.
    """
    worker_state.should_stop = exitcode


def be_quiet(worker: Any, say: Callable[[str], None]) -> None:
    """Keep `worker` from printing its banner. Its signal handlers print to `say`."""
    worker.quiet = True

    def safe_say(text: str, *_: object) -> None:
        say(text)

    worker_program.safe_say = safe_say


def is_terminating() -> bool:
    """Whether a cold shutdown was asked for."""
    asked = worker_state.should_terminate
    return asked is not None and asked is not False


def unacked_commands(message: bytes, prefix: str) -> Sequence[Command]:
    """The commands by which kombu's QoS.append records a delivered message."""
    raw = json.loads(message)
    properties = raw["properties"]
    tag, info = properties["delivery_tag"], properties["delivery_info"]
    record = json.dumps([raw, info["exchange"], info["routing_key"]])
    return (
        ("ZADD", prefix + UNACKED_INDEX, time.time(), tag),
        ("HSET", prefix + UNACKED, tag, record),
    )


def acked_commands(message: bytes, prefix: str) -> Sequence[Command]:
    """The commands that make kombu forget a delivered message."""
    tag = json.loads(message)["properties"]["delivery_tag"]
    return (("ZREM", prefix + UNACKED_INDEX, tag), ("HDEL", prefix + UNACKED, tag))


def read_body(raw: Mapping[str, Any]) -> Any:
    """The body of a message, as Celery's handler reads it. Raises whatever that would raise."""
    body = pybase64.b64decode(raw["body"]) if _is_base64(raw) else raw["body"]
    kind, encoding = raw["content-type"], raw["content-encoding"]
    return serialization.loads(body, kind, encoding, accept={codec.JSON, codec.MSGPACK})


def _is_base64(raw: Mapping[str, Any]) -> bool:
    return bool(raw["properties"].get("body_encoding") == "base64")


def _settle_once(settle: Callable[..., None], settled: Callable[[], None], **options: Any) -> None:
    """If a result cannot be stored, Celery acknowledges twice, which ends a stock worker."""
    settled()
    try:
        settle(**options)
    except MessageStateError as problem:
        logger.warning("a task was settled already: %s", problem)


def deliver(consumer: Consumer, message: bytes, settled: Callable[[], None]) -> None:
    """Give a message in kombu's unacked to Celery's own handler, in the main thread.

    `settled` is called when it is acknowledged. A message that the handler cannot even read, which
    would end a stock worker, is answered and dropped.
    """
    raw = json.loads(message)
    channel = consumer.task_consumer.channel
    try:
        delivered = channel.Message(raw, channel=channel)
        for name in ("ack", "reject", "requeue"):
            setattr(delivered, name, partial(_settle_once, getattr(delivered, name), settled))
        channel.qos.append(delivered, delivered.delivery_tag)
        consumer.task_consumer._receive_callback(delivered)
    except consumer.connection_errors:
        raise  # The consumer starts anew, and the message goes back to its queue.
    except Exception as problem:
        task_id = raw["headers"]["id"]
        told = about(task_id)
        logger.exception("task %s cannot be read", task_id, extra=told)
        try:
            consumer.app.backend.mark_as_failure(task_id, problem)
        except consumer.connection_errors:
            raise
        except Exception:
            logger.exception("task %s cannot be answered", task_id, extra=told)
        settled()
        channel.qos.reject(raw["properties"]["delivery_tag"])


def let_tasks_end(consumer: Consumer) -> None:
    """Make a cold shutdown wait for the task that Celery's own handler executes.

    It cannot be ended earlier: the solo pool executes it in the main thread, where the signal's
    handler interrupts it, and what that handler raises would become the task's failure.
    """
    consumer.cancel_active_requests = lambda: None


def restore_messages(consumer: Consumer) -> None:
    """Put back into their queues what dead workers held too long (kombu's visibility_timeout).

    kombu does so only where it consumes some queue itself.
    """
    channel = consumer.task_consumer.channel
    if not channel.active_queues:
        with suppress(*channel.connection_errors):  # the consumer notices by itself
            channel.qos.restore_visible(interval=1)


def task_events_enabled(consumer: Consumer | None) -> bool | None:
    """Whether ``-E`` or ``enable_events`` has a worker send task events; None: not known now."""
    dispatcher = getattr(consumer, "event_dispatcher", None)
    if dispatcher is None:
        return None
    return not dispatcher.groups or "task" in dispatcher.groups


def name_event_groups(consumer: Consumer) -> None:
    """Name the groups of events that a worker with ``-E`` sends.

    Stock ``disable_events`` disables nothing if none is named, although that means all.
    """
    dispatcher = consumer.event_dispatcher
    if dispatcher is not None and not dispatcher.groups:
        dispatcher.groups.update(("worker", "task"))


def event_topic(prefix: str, db: int, routing_key: str) -> str:
    """Where kombu publishes messages of the exchange of events."""
    return f"{prefix}/{db}.{EVENT_EXCHANGE_NAME}/{routing_key}"


def event_message(body: Any, routing_key: str, node: str) -> bytes:
    """An event, or a list of them, as EventDispatcher publishes it: in kombu's envelope."""
    message = {
        "body": pybase64.b64encode_as_string(msgspec.json.encode(body)),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"hostname": node},
        "properties": {
            "delivery_mode": 1,
            "delivery_info": {"exchange": EVENT_EXCHANGE_NAME, "routing_key": routing_key},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
        },
    }
    return msgspec.json.encode(message)
