"""Foreign tasks on models' queues: which of them Celery's own handler gets, and as what message.

Without INFERQ_FOREIGN_TASKS=1 it gets none. With it, anybody who may push to a queue can run the
tasks of this worker's app, and no more than that: none of Celery's own tasks, which start others,
and nothing compressed. The sender does not choose the queue to which such a task is put back, nor
the tag by which Redis knows it until it has run: the message is made anew from the fields that
Celery reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from typing import Any, Final
from uuid import uuid4

from inferq.shared import codec
from inferq.shared.errors import InvalidInput, NotRegistered, PayloadTooLarge
from inferq.workers.canvas import celery_canvas

#: Most bytes of such a message. Decoded, it may take fifty times that.
MAX_BYTES: Final = 256 * 1024
#: Deepest nesting of one, which Celery's main thread reads recursively.
MAX_NESTING: Final = 100
#: Prefix of Celery's own tasks: groups, chunks, waiting for the parts of a chord.
BUILTIN: Final = "celery."
#: The headers that are kept.
_HEADERS: Final = celery_canvas.HEADERS - {"compression"}
_FOLLOWING: Final = frozenset({"callbacks", "errbacks", "chain", "chord"})
#: Longest name of a task in a message.
MAX_NAME: Final = 200


def not_registered(task: str) -> NotRegistered:
    """Like Celery's exception of that name, its message is the task's name."""
    return NotRegistered(task[:MAX_NAME])


class ForeignTasks:
    """`registered` holds the names of the tasks of the worker's app.

    `read_body` reads a message's body as the handler will, and raises what that would raise.
    """

    def __init__(
        self, registered: Container[str], read_body: Callable[[Mapping[str, Any]], Any]
    ) -> None:
        self._registered = registered
        self._read_body = read_body

    def message(self, message: bytes, envelope: codec.Envelope, queue: str, step: int) -> bytes:
        """The message to give to Celery for `message`, which was read as `envelope` from `queue`.

        Raises the InferqError with which it is answered.
        """
        task, compression = envelope.headers.task, envelope.headers.compression
        if task.startswith(BUILTIN) or task not in self._registered:
            raise not_registered(task)
        if compression:
            raise InvalidInput(f"compression {compression[:100]!r}; expected none")
        if len(message) > MAX_BYTES:
            raise PayloadTooLarge(
                f"the message is {len(message)} bytes; expected at most {MAX_BYTES} of a task "
                "that Celery's own handler runs"
            )
        embed = codec.decode_body(envelope).embed
        # Celery takes these fields, and headers of the same name, for the task's own state: its id,
        # where it is retried, which tasks follow it.
        if embed.keys() - _FOLLOWING or any(embed.values()):
            raise InvalidInput(
                "links, a chain, a chord or other state stands in it; expected none of a task that "
                "Celery's own handler runs: send it to a queue of its own"
            )
        try:
            raw = json.loads(message)
            given = _message(raw, envelope, queue, step)
            body = self._read_body(given)
        except Exception as problem:  # whatever the handler would raise
            raise InvalidInput(f"the message cannot be read: {problem!r}") from problem
        for part in (raw["headers"], body):
            if is_nested_deeper(part, MAX_NESTING):
                raise InvalidInput(f"it is nested more than {MAX_NESTING} levels deep")
        return json.dumps(given).encode()


def _message(
    raw: Mapping[str, Any], envelope: codec.Envelope, queue: str, step: int
) -> dict[str, Any]:
    properties = raw["properties"]
    known = {name: properties.get(name) for name in ("correlation_id", "reply_to")}
    return {
        "body": raw["body"],
        "content-encoding": "binary" if envelope.content_type == codec.MSGPACK else "utf-8",
        "content-type": envelope.content_type,
        "headers": {name: each for name, each in raw["headers"].items() if name in _HEADERS},
        "properties": {
            **{name: each for name, each in known.items() if isinstance(each, str)},
            "body_encoding": envelope.properties.body_encoding,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_mode": 2,
            "delivery_tag": str(uuid4()),
            "priority": step,
        },
    }


def is_nested_deeper(value: object, levels: int) -> bool:
    """Whether lists and mappings are nested more than `levels` deep."""
    inside = [value]
    for _ in range(levels):
        inside = [
            child
            for outer in inside
            if isinstance(outer, dict | list | tuple)
            for child in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not inside:
            return False
    return True
