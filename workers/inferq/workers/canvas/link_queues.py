"""To which queues a worker sends what follows on a request.

A sender names them, and the worker may write where the sender may not. So it writes to queues of
applications, and to nothing that inferq, Celery or kombu keep in Redis for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from inferq.shared.errors import InvalidInput
from inferq.shared.names import Names

#: Most bytes of a queue's name, as in AMQP.
MAX_QUEUE_BYTES: Final = 255
#: Most characters of a name that an error message shows.
_SHOWN: Final = 100
#: Names of queues of which it is remembered whether they may be sent to.
_REMEMBERED: Final = 256
CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: What keys of others than applications begin with, after kombu's prefix.
_BEGINNINGS: Final = ("_kombu", "celeryev", "unacked")
#: What stands in such keys, after whatever prefix: those of another application on this Redis too.
_KEPT: Final = re.compile(
    r"inferq:\d|celery-task-meta-|celery-taskset-meta-|chord-unlock-|celery\.pidbox|_kombu\.binding"
)


class LinkQueues:
    """The queues that match one of `patterns`, less those that nobody may send to."""

    def __init__(self, names: Names, patterns: Sequence[str] = ("*",)) -> None:
        self._names = names
        self._patterns = tuple(patterns)
        #: What is wrong with the queues that were looked at last, or nothing.
        self._problems: dict[str, str | None] = {}

    def check(self, queue: object) -> str:
        """`queue`, if it may be sent to. InvalidInput: it may not."""
        if not isinstance(queue, str):
            raise InvalidInput(f"is {type(queue).__name__}; expected a queue's name")
        try:
            problem = self._problems[queue]
        except KeyError:
            problem = self._problem(queue)
            if len(self._problems) >= _REMEMBERED:
                self._problems.clear()
            self._problems[queue[: 2 * MAX_QUEUE_BYTES]] = problem
        if problem is not None:
            raise InvalidInput(f"{queue[:_SHOWN]!r} {problem}")
        return queue

    def _problem(self, queue: str) -> str | None:
        try:
            size = len(queue.encode())
        except UnicodeEncodeError:
            return "is no UTF-8; expected a queue's name"
        if not 0 < size <= MAX_QUEUE_BYTES:
            return f"has {size} bytes; expected from 1 to {MAX_QUEUE_BYTES}"
        if CONTROL.search(queue) or self._names.sep in queue:
            return "has control characters or the separator of priorities; expected neither"
        key = self._names.list_of(queue)
        if queue.startswith(_BEGINNINGS) or _KEPT.search(key):
            return "is kept by inferq or Celery; expected a queue of an application"
        if not any(fnmatchcase(queue, pattern) for pattern in self._patterns):
            allowed = ", ".join(self._patterns)
            return f"is not open to links; expected one of {allowed[:500]} (INFERQ_LINK_QUEUES)"
        return None
