"""What follows on a request (links, a chain, a chord), rebuilt from what it may consist of.

Celery publishes it with whatever a sender wrote into it. So each signature, however deep, is made
anew of the fields and options that Celery's canvases need, and all of them are counted and weighed
together. No function here calls itself, since the sender also chooses how deeply they nest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from inferq.shared.codec.content import pack
from inferq.shared.errors import InvalidInput, PayloadTooLarge
from inferq.workers.link_options import check_count, rebuilt_options, shown
from inferq.workers.link_queues import LinkQueues

#: Most signatures that follow on a request, wherever they stand.
MAX_FOLLOWING: Final = 1_000
#: Deepest nesting of signatures, and of chords: Celery reads them recursively, and copies what is
#: in a chord again at each level.
MAX_NESTING: Final = 30
MAX_CHORDS_NESTED: Final = 5
#: Most bytes that are published for one request: so many, or so many times its largest message. A
#: chord's header carries a copy of its body in each part.
MAX_PUBLISHED_BYTES: Final = 8 << 20
MAX_COPIES: Final = 4
#: Bytes of a message beside its signature: headers, and short forms of arguments.
_ENVELOPE_BYTES: Final = 1_500
_MAX_NAME_CHARS: Final = 1_000
#: The task names of Celery's own that canvases are made of, by their type.
_CANVASES: Final = {"group": "celery.group", "chain": "celery.chain", "chord": "celery.chord"}
#: Of Celery's own tasks that a worker runs, the only one that stands in canvases: Task.replace puts
#: it behind a group.
_ACCUMULATE: Final = "celery.accumulate"
_DEFAULT_QUEUE: Final = "celery"


class Following(msgspec.Struct, frozen=True):
    """What follows on one request, safe to be published by Celery."""

    callbacks: list[dict[str, Any]]
    errbacks: list[dict[str, Any]]
    chain: list[dict[str, Any]]
    chord: dict[str, Any] | None


class _Node:
    """A signature on its way: what was given, and what is made of it."""

    __slots__ = (
        "attached", "body", "built", "chords", "depth", "given", "kind", "members", "own", "place",
        "queued", "size",
    )  # fmt: skip

    def __init__(self, given: object, place: str, depth: int, chords: int, queued: bool) -> None:
        self.given = given
        self.place = place
        self.depth = depth
        #: Chords that it is inside of.
        self.chords = chords
        #: Whether a canvas around it names the queue.
        self.queued = queued
        self.built: dict[str, Any] = {}
        self.kind: str | None = None
        #: Bytes of its own, and with all that is inside.
        self.own = self.size = 0
        #: A group's tasks, a chain's steps, or a chord's header.
        self.members: list[_Node] = []
        self.body: _Node | None = None
        #: Its links, and the like.
        self.attached: list[_Node] = []


def following(embed: Mapping[str, Any], message_bytes: int, queues: LinkQueues) -> Following:
    """What `embed`, from a message of so many bytes, has follow.

    InvalidInput names what cannot be served; PayloadTooLarge: it would be too much to publish.
    """
    return _Walk(queues).rebuilt(embed, message_bytes)


class _Walk:
    def __init__(self, queues: LinkQueues) -> None:
        self._queues = queues
        #: Parents before what is inside of them.
        self._nodes: list[_Node] = []

    def rebuilt(self, embed: Mapping[str, Any], message_bytes: int) -> Following:
        given = {name: embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
        lists = {
            name: self._several(value, name, None)
            for name, value in given.items()
            if value and name != "chord"
        }
        chord = self._one(given["chord"], "chord", None) if given["chord"] else None
        for node in self._nodes:  # which grows meanwhile
            self._build(node)
        self._weigh()
        starts = [(node, 0) for name in ("callbacks", "errbacks") for node in lists.get(name, [])]
        if chain := lists.get("chain"):
            starts.append((chain[-1], sum(node.size for node in chain[:-1])))
        if chord is not None:
            starts.append((chord, 0))
        check_bytes(_published(starts), message_bytes)
        built = {name: [node.built for node in nodes] for name, nodes in lists.items()}
        return Following(
            built.get("callbacks", []), built.get("errbacks", []), built.get("chain", []),
            None if chord is None else chord.built,
        )  # fmt: skip

    def _one(
        self, given: object, place: str, around: _Node | None, *, member: bool = False
    ) -> _Node:
        depth = chords = 0
        queued = False
        if around is not None:
            depth = around.depth + 1
            chords = around.chords + (around.kind == "chord")
            queued = member and (around.queued or "queue" in around.built["options"])
        if depth >= MAX_NESTING:
            raise InvalidInput(f"signatures nest more than {MAX_NESTING} deep, at {place[:200]}")
        if len(self._nodes) >= MAX_FOLLOWING:
            raise InvalidInput(
                f"more than {MAX_FOLLOWING} signatures follow on it, at {place[:200]}; "
                f"expected at most {MAX_FOLLOWING} in all"
            )
        node = _Node(given, place, depth, chords, queued)
        self._nodes.append(node)
        return node

    def _several(
        self, given: object, place: str, around: _Node | None, *, member: bool = False
    ) -> list[_Node]:
        if not isinstance(given, list | tuple):
            raise InvalidInput(f"{place} is {shown(given)}; expected a list of signatures")
        return [
            self._one(each, f"{place}[{index}]", around, member=member)
            for index, each in enumerate(given)
        ]

    def _build(self, node: _Node) -> None:
        given, place = node.given, node.place
        if not isinstance(given, dict):
            raise InvalidInput(f"{place} is {shown(given)}; expected a signature of Celery")
        kind, task = given.get("subtask_type") or None, given.get("task")
        if kind is not None and (not isinstance(kind, str) or kind not in _CANVASES):
            raise InvalidInput(
                f"{place}.subtask_type {shown(kind)}; expected {', '.join(_CANVASES)}"
            )
        node.kind = kind
        if kind is not None:
            task = _CANVASES[kind]
        elif not isinstance(task, str) or not 0 < len(task) <= _MAX_NAME_CHARS:
            raise InvalidInput(f"{place}.task {shown(task)}; expected a task's name")
        elif task.startswith("celery.") and task != _ACCUMULATE:
            raise InvalidInput(
                f"{place}.task {shown(task)} is Celery's own; expected a task of an application, "
                "a group, a chain or a chord"
            )
        args, kwargs = given.get("args") or [], given.get("kwargs") or {}
        options = given.get("options") or {}
        if not isinstance(args, list | tuple):
            raise InvalidInput(f"{place}.args is {shown(args)}; expected a list")
        for name, value in (("kwargs", kwargs), ("options", options)):
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise InvalidInput(f"{place}.{name} is {shown(value)}; expected a mapping by names")
        plain = rebuilt_options(
            f"{place}.options", options, self._queues, groups=kind in {"group", "chord"}
        )
        node.built.update(
            task=task, args=list(args), kwargs={}, options=plain, subtask_type=kind,
            immutable=bool(given.get("immutable")),
        )  # fmt: skip
        if (size := given.get("chord_size")) is not None:
            node.built["chord_size"] = check_count(f"{place}.chord_size", size)
        if kind is None:
            if not node.queued and "queue" not in plain:
                self._queues.check(f"{place} names no queue, and", _DEFAULT_QUEUE)
            own = node.built["kwargs"] = kwargs
        else:
            own = self._canvas(node, kwargs)
        node.own = _bytes_of(place, (task, args, own, plain))
        self._attach(node, options)

    def _canvas(self, node: _Node, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make a group, chain or chord of its parts; what its plain arguments are."""
        place, built = node.place, node.built["kwargs"]
        if node.kind != "chord":
            node.members = self._several(
                kwargs.get("tasks"), f"{place}.kwargs.tasks", node, member=True
            )
            built["tasks"] = [each.built for each in node.members]
            return {}
        if node.chords >= MAX_CHORDS_NESTED:
            raise InvalidInput(f"chords nest more than {MAX_CHORDS_NESTED} deep, at {place[:200]}")
        header, within = kwargs.get("header"), f"{place}.kwargs.header"
        if isinstance(header, dict):
            node.members = [self._one(header, within, node, member=True)]
            built["header"] = node.members[0].built
        else:
            node.members = self._several(header, within, node, member=True)
            built["header"] = [each.built for each in node.members]
        node.body = self._one(kwargs.get("body"), f"{place}.kwargs.body", node, member=True)
        own = kwargs.get("kwargs") or {}
        if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
            raise InvalidInput(f"{place}.kwargs.kwargs {shown(own)}; expected a mapping by names")
        built.update(body=node.body.built, kwargs=own)
        return own

    def _attach(self, node: _Node, options: dict[str, Any]) -> None:
        built = node.built["options"]
        for name in ("link", "link_error", "chain"):
            given, place = options.get(name), f"{node.place}.options.{name}"
            if given:
                found = self._several([given] if isinstance(given, dict) else given, place, node)
                built[name] = [each.built for each in found]
                node.attached += found
        if given := options.get("chord"):
            found = [self._one(given, f"{node.place}.options.chord", node)]
            built["chord"] = found[0].built
            node.attached += found

    def _weigh(self) -> None:
        for node in reversed(self._nodes):
            inside = [*node.members, *node.attached]
            if node.body is not None:
                inside.append(node.body)
            node.size = node.own + sum(each.size for each in inside)


def _published(starts: list[tuple[_Node, int]]) -> int:
    """Bytes of all that is published at once for `starts`; each is sent with so many more."""
    total = 0
    waiting = list(starts)
    while waiting:
        node, carried = waiting.pop()
        beside = carried + node.own + sum(each.size for each in node.attached)
        if node.kind is None:
            total += beside + _ENVELOPE_BYTES
        elif node.kind == "chain":
            if node.members:
                rest = sum(each.size for each in node.members[1:])
                # Each step is given the chain's errbacks.
                rest += len(node.members) * (beside - carried)
                waiting.append((node.members[0], carried + rest))
        else:
            if node.body is not None:
                beside += node.body.size
                if not node.members:
                    waiting.append((node.body, beside))
            waiting += [(each, beside) for each in node.members]
    return total


def check_bytes(published: int, largest: int) -> None:
    """PayloadTooLarge, if so many bytes are more than may follow on a message of `largest`."""
    if published > max(MAX_PUBLISHED_BYTES, MAX_COPIES * largest):
        raise PayloadTooLarge(
            f"what follows on it is {published} bytes of messages; expected at most "
            f"{MAX_PUBLISHED_BYTES}, or {MAX_COPIES} times the largest of them"
        )


def _bytes_of(place: str, value: object) -> int:
    try:
        return len(pack(value))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.EncodeError) as problem:
        raise InvalidInput(f"{place} cannot be written: {problem}") from problem
