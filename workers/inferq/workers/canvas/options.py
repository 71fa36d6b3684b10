"""The options of a signature that follows on a request, rebuilt: what is known, and of its type.

Celery hands on whatever stands there as keywords, down to kombu's connection, which it shares with
all that the process sends. So nothing passes that is not named here; what Celery's canvases need
is. Unknown options are dropped: applications put many harmless ones there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from inferq.shared.codec.messages import MAX_ID_CHARS
from inferq.shared.errors import InvalidInput
from inferq.workers.canvas import celery_canvas
from inferq.workers.canvas.link_queues import CONTROL, LinkQueues

#: Furthest in s that a time may lie ahead, or a limit reach.
MAX_SECONDS: Final = 10 * 366 * 86_400
#: Most stamps, or headers, of one signature.
MAX_STAMPS: Final = 100
#: Most characters of a text that is only shown.
MAX_SHOWN_CHARS: Final = 2_000
_MAX_PRIORITY: Final = 9
_MAX_COUNT: Final = 1 << 31
#: How keys end in which a chord counts its parts.
_CHORD_KEY: Final = re.compile(r"\.[a-z]\Z")


def shown(value: object) -> str:
    """`value` in an error message."""
    return f"{value!r:.60}" if isinstance(value, str | int | float) else type(value).__name__


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{shown(value)}; expected a text")
    return value[:MAX_SHOWN_CHARS]


def check_id(value: object) -> str:
    """An id, which becomes part of a key."""
    if not isinstance(value, str) or len(value) > MAX_ID_CHARS or CONTROL.search(value):
        raise InvalidInput(
            f"{shown(value)}; expected an id of at most {MAX_ID_CHARS} characters, "
            "without control characters"
        )
    return value


def check_group_id(value: object) -> str:
    """The id of a group: a chord's counters have keys of their own beside it."""
    if _CHORD_KEY.search(check_id(value)):
        raise InvalidInput(f"{shown(value)}; expected none that ends like a chord's keys")
    return str(value)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInput(f"{shown(value)}; expected a whole number")
    return value


def _priority(value: object) -> int:
    return max(0, min(_MAX_PRIORITY, _whole(value)))  # as kombu does


def check_count(value: object) -> int:
    """A whole number that Celery counts with."""
    if not 0 <= _whole(value) < _MAX_COUNT:
        raise InvalidInput(f"{shown(value)}; expected from 0 to {_MAX_COUNT}")
    return _whole(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(f"{shown(value)}; expected true or false")
    return value


def _seconds(value: object) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not abs(value) <= MAX_SECONDS:  # type: ignore[arg-type]
        raise InvalidInput(f"{shown(value)}; expected seconds, {MAX_SECONDS} at most")
    return value  # type: ignore[return-value]


def _time(value: object) -> str:
    """A time in ISO 8601; Celery's JSON writes ``{"__type__": "datetime", "__value__": …}``."""
    if isinstance(value, dict) and value.get("__type__") == "datetime":
        value = value.get("__value__")
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise InvalidInput(f"{shown(value)}; expected an ISO 8601 time") from None
    if not isinstance(value, datetime):
        raise InvalidInput(f"{shown(value)}; expected an ISO 8601 time")
    return value.isoformat()


def _expires(value: object) -> float | str:
    return _seconds(value) if isinstance(value, int | float) else _time(value)


def _headers(value: object) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    foreign = {
        name: given
        for name, given in value.items()
        if isinstance(name, str) and name not in celery_canvas.HEADERS
    }
    if len(foreign) > MAX_STAMPS:
        raise InvalidInput(f"are {len(foreign)}; expected {MAX_STAMPS} at most")
    return foreign or None


_CHECKS: Final[Mapping[object, Callable[[object], Any]]] = {
    "priority": _priority,
    "eta": _time,
    "countdown": _seconds,
    "expires": _expires,
    "time_limit": _seconds,
    "soft_time_limit": _seconds,
    "ignore_result": _flag,
    "retries": check_count,
    "replaced_task_nesting": check_count,
    "task_id": check_id,
    "root_id": check_id,
    "parent_id": check_id,
    "reply_to": check_id,
    "group_id": check_group_id,
    "group_index": check_count,
    "shadow": _text,
    "argsrepr": _text,
    "kwargsrepr": _text,
    "headers": _headers,
}


def rebuilt_options(
    given: Mapping[Any, Any], queues: LinkQueues, *, groups: bool
) -> dict[str, Any]:
    """What is kept of the options `given`, but for the signatures among them.

    `groups`: its task_id is that of a group. InvalidInput names the option that cannot be served.
    """
    kept: dict[str, Any] = {}
    name: Any = None
    try:
        for name, value in given.items():
            check = _CHECKS.get(name)
            if check is not None and value is not None and (found := check(value)) is not None:
                kept[name] = found
        name = "task_id"
        if groups and name in kept:
            check_group_id(kept[name])
        name = "queue"
        if queue := given.get(name):
            kept[name] = queues.check(queue)
        elif given.get("exchange") and given.get("routing_key"):
            name = "exchange"
            raise InvalidInput(f"{shown(given[name])} stands for no queue; expected a queue")
        name = "stamped_headers"
        if name in given:
            kept.update(_stamps(given))
    except InvalidInput as problem:
        raise InvalidInput(f"{name} {problem.message}") from None
    return kept


def _stamps(given: Mapping[Any, Any]) -> dict[str, Any]:
    """What was stamped on it: listed options of any name that is not one of Celery's."""
    listed = given["stamped_headers"]
    if not isinstance(listed, list | tuple):
        return {}
    if len(listed) > MAX_STAMPS:
        raise InvalidInput(f"are {len(listed)}; expected {MAX_STAMPS} at most")
    stamps = {
        name: given[name]
        for name in listed
        if isinstance(name, str) and name in given and name not in celery_canvas.KEYWORDS
    }
    return {**stamps, "stamped_headers": list(stamps)} if stamps else {}
