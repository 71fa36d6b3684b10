"""Canvases as clients embed them in requests."""

from __future__ import annotations

from typing import Any

from inferq.shared.names import Names
from inferq.workers.canvas.following import (
    Following,
    following,
)
from inferq.workers.canvas.link_queues import LinkQueues

NAMES = Names()
ANY = LinkQueues(NAMES)
#: Options that hold signatures.
ATTACHED = ("link", "link_error", "chain", "chord")


def plain(task: str = "app.task", **options: Any) -> dict[str, Any]:
    return {
        "task": task, "args": [], "kwargs": {}, "options": options, "subtask_type": None,
        "immutable": False,
    }  # fmt: skip


def canvas(kind: str, options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    return {**plain(f"celery.{kind}", **(options or {})), "kwargs": kwargs, "subtask_type": kind}


def rebuilt(embed: dict[str, Any], size: int = 0, queues: LinkQueues = ANY) -> Following:
    return following(embed, size, queues)


def inside(signature: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`signature` wherever one may stand, by the name of the place."""
    return {
        "callbacks": {"callbacks": [signature]},
        "errbacks": {"errbacks": [signature]},
        "chain": {"chain": [plain(), signature]},
        "chord": {"chord": signature},
        "link": {"callbacks": [plain(link=[signature])]},
        "link alone": {"callbacks": [plain(link=signature)]},
        "link_error": {"chain": [plain(link_error=[signature])]},
        "chain option": {"callbacks": [plain(chain=[signature])]},
        "chord option": {"callbacks": [plain(chord=signature)]},
        "group": {"callbacks": [canvas("group", tasks=[plain(), signature])]},
        "chain's tasks": {"chord": canvas("chain", tasks=[plain(), signature])},
        "header": {"callbacks": [canvas("chord", header=[signature], body=plain(), kwargs={})]},
        "header's group": {
            "callbacks": [
                canvas("chord", header=canvas("group", tasks=[signature]), body=plain(), kwargs={})
            ]
        },
        "body": {"errbacks": [canvas("chord", header=[plain()], body=signature, kwargs={})]},
        "deep": {
            "callbacks": [
                plain(link=[canvas("group", tasks=[canvas("chain", tasks=[plain(), signature])])])
            ]
        },
    }


PLACES = list(inside(plain()))


def signatures_of(built: object) -> list[dict[str, Any]]:
    """Those in `built`. What a task is called with may look like one, and is its own."""
    found, waiting = [], [built]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if "subtask_type" not in each:
                waiting += each.values()
                continue
            found.append(each)
            waiting += [each["options"].get(name) for name in ATTACHED]
            if each["subtask_type"] is not None:
                waiting += [each["kwargs"].get(name) for name in ("tasks", "header", "body")]
        elif isinstance(each, list):
            waiting += each
    return found


def all_of(follows: Following) -> list[dict[str, Any]]:
    return signatures_of([follows.callbacks, follows.errbacks, follows.chain, follows.chord])
