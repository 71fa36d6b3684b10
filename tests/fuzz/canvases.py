"""Canvases that mean harm: options that reach kombu, keys as queues, what multiplies or nests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

Tree = Any

LINKS_QUEUE: Final = "fuzz.links"
#: Where nothing that follows on a request may go.
_KEYS: Final = (
    "inferq:1:later", "inferq:1:leases", "inferq:1:attempts:echo", "inferq:1:dead:echo",
    "inferq:1:later:echo:0:0", "inferq:2:later", "inferq.echo\x06\x163", "celery-task-meta-other",
    "celery-taskset-meta-g.s", "test@host.celery.pidbox", "x.reply.celery.pidbox", "celeryev.x",
    "_kombu.binding.celery", "unacked", "unacked_index", "a\nb", "\x00", "x" * 300, "é" * 200, 5,
)  # fmt: skip
#: Somebody's keys that are no lists.
_OTHERS: Final = ("unrelated",)
_OPTIONS: Final[tuple[dict[str, Any], ...]] = (
    {"retry": True, "retry_policy": {"global_keyprefix": "stolen:"}},
    {"retry": True, "retry_policy": {"priority_steps": [], "sep": "", "max_retries": None}},
    {"connection": "redis://127.0.0.1:1", "producer": {}, "publisher": 5},
    {"exchange": "stolen", "routing_key": "stolen", "exchange_type": "fanout"},
    {"serializer": "pickle", "compression": "bzip2", "content_type": "x"},
    {"declare": [1], "transport_options": {}, "delivery_info": {"is_eager": True}},
    {"priority": -1}, {"priority": "high"}, {"countdown": float("inf")}, {"countdown": -1e18},
    {"countdown": 1e-9}, {"eta": "never"}, {"expires": -5}, {"expires": "2020-01-01"},
    {"task_id": "other"}, {"task_id": "x\x00"}, {"task_id": "x" * 2000}, {"group_id": "g.s"},
    {"stamped_headers": ["producer", "app"], "producer": 1, "app": 2}, {"chain": [5]},
    {"headers": {"task": "inferq.infer", "compression": "bzip2", "x": [1] * 100}},
    {"ignore_result": "x"}, {"reply_to": ["x"]}, {"link": 5}, {"chord": "x"}, {"time_limit": []},
)  # fmt: skip
_TASKS: Final = (
    "celery.map", "celery.starmap", "celery.chunks", "celery.chord_unlock", "celery.group",
    "celery.backend_cleanup", "celery.accumulate", "", "x" * 2000, 5,
)  # fmt: skip


def _link(rng: random.Random, **options: Any) -> dict[str, Any]:
    return {
        "task": "fuzz.link",
        "args": [],
        "kwargs": {},
        "immutable": rng.random() < 0.2,
        "options": {"queue": LINKS_QUEUE, **options},
        "subtask_type": None,
    }


def _of(rng: random.Random, kind: str, **kwargs: Any) -> dict[str, Any]:
    return {**_link(rng), "task": f"celery.{kind}", "subtask_type": kind, "kwargs": kwargs}


def _wrapped(rng: random.Random, signature: Any) -> dict[str, Any]:
    """`signature` inside of another, in one of the places where one may stand."""
    match rng.randrange(8):
        case 0:
            return _of(rng, "group", tasks=[_link(rng), signature])
        case 1:
            return _of(rng, "chain", tasks=[_link(rng), signature, _link(rng)])
        case 2:
            return _of(rng, "chord", header=[_link(rng), signature], body=_link(rng), kwargs={})
        case 3:
            return _of(rng, "chord", header=[_link(rng)], body=signature, kwargs={})
        case 4:
            return _link(rng, link=[signature])
        case 5:
            return _link(rng, link_error=[signature])
        case 6:
            return _link(rng, chord=signature, group_id="g")
        case _:
            return _link(rng, chain=[signature, _link(rng)])


def _placed(rng: random.Random, tree: Tree, signature: Any, wraps: int) -> Tree:
    """Have `signature` follow on the request, so many signatures deep."""
    for _ in range(wraps):
        signature = _wrapped(rng, signature)
    slot = rng.choice(("callbacks", "callbacks", "errbacks", "chain", "chord"))
    tree["body"][2] = {slot: signature if slot == "chord" else [_link(rng), signature]}
    if slot == "chord":
        # Of each its own: a chord is over when as many as it says have come.
        tree["headers"] |= {"group": f"g{rng.getrandbits(64):x}", "group_index": 0}
    if rng.random() < 0.3:  # it fails: errbacks are called, and the rest of its chain fails
        tree["body"][1] = {"inputs": {}}
    if rng.random() < 0.2:
        tree["properties"]["delivery_info"] = {"is_eager": True, "exchange": [], "routing_key": {}}
    return tree


def options(rng: random.Random, tree: Tree) -> Tree:
    """Options that once reached kombu's pooled connection, or are of a wrong type."""
    return _placed(rng, tree, _link(rng, **rng.choice(_OPTIONS)), rng.choice((0, 0, 1, 3)))


def queues(rng: random.Random, tree: Tree) -> Tree:
    """Keys in place of queues. Redis itself refuses somebody's key that is no list."""
    if rng.random() < 0.4:
        tree["body"][2] = {"callbacks": [_link(rng, queue=rng.choice(_OTHERS)), _link(rng)]}
        return tree
    return _placed(rng, tree, _link(rng, queue=rng.choice(_KEYS)), rng.randrange(4))


def builtins(rng: random.Random, tree: Tree) -> Tree:
    """Tasks and signatures of Celery's own."""
    signature = {**_link(rng), "task": rng.choice(_TASKS)}
    if rng.random() < 0.5:
        signature["subtask_type"] = rng.choice(("chunks", "xmap", "xstarmap", "chord", "", 5, []))
    signature["kwargs"] = {"task": _link(rng), "it": [[n] for n in range(50)], "n": 1}
    return _placed(rng, tree, signature, rng.randrange(3))


def many(rng: random.Random, tree: Tree) -> Tree:
    """More signatures than may follow, or, seldom, nearly as many.

    Each that may follow is a message for the worker to send: as much work as one more request.
    """
    (count,) = rng.choices((20, 200, 900, 1_100), (8, 3, 1, 4))
    tasks = [_link(rng) for _ in range(count)]
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "group": lambda: _of(rng, "group", tasks=tasks),
        "chain": lambda: _of(rng, "chain", tasks=tasks),
        "chord": lambda: _of(
            rng,
            "chord",
            header=tasks[:-10] or tasks,
            kwargs={},
            body=_of(rng, "chain", tasks=tasks[-10:]),
        ),
    }
    return _placed(rng, tree, kinds[rng.choice(list(kinds))](), rng.choice((0, 0, 1)))


def deep(rng: random.Random, tree: Tree) -> Tree:
    """Signatures within signatures."""
    return _placed(rng, tree, _link(rng), rng.choice((5, 10, 29, 31, 60)))


def joins(rng: random.Random, tree: Tree) -> Tree:
    """Chords with groups in their headers, and strangers that say to be their parts.

    Celery waits for the results of the parts that are meant, which nobody runs.
    """
    group_id = f"joined{rng.randrange(8)}"
    body = _link(rng, link_error=[_link(rng)])
    if rng.random() < 0.3:
        inner = _of(rng, "group", tasks=[_link(rng) for _ in range(rng.choice((1, 2)))])
        header = [_of(rng, "chain", tasks=[_link(rng), inner]), _link(rng)]
        chord = _of(rng, "chord", header=header, body=body, kwargs={})
        chord["options"] = {"task_id": group_id}
        tree["body"][2] = {"callbacks": [chord]}
    else:
        tree["headers"] |= {"group": group_id, "group_index": rng.randrange(3)}
        tree["body"][2] = {"chord": body}
    return tree
