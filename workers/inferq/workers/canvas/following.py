"""What follows on a request (links, a chain, a chord), rebuilt from what it may consist of.

Celery publishes it with whatever a sender wrote into it. So each signature, however deep, is made
anew of the fields and options that Celery's canvases need, and all of them are counted and weighed
together. No function here calls itself, since the sender also chooses how deeply they nest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from inferq.shared.codec.content import pack
from inferq.shared.codec.messages import MAX_MESSAGE_BYTES
from inferq.shared.errors import InvalidInput, PayloadTooLarge
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.canvas.options import check_count, rebuilt_options, shown

#: Most signatures that follow on a request, wherever they stand.
MAX_FOLLOWING: Final = 1_000
#: Of so many it is found out before the request is computed whether they are good. More of them
#: take up to 6 ms, in which the data plane would settle nothing of any model, and form no batch.
FEW: Final = 64
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
_GROUPS: Final = frozenset({"group", "chord"})
#: Options that hold signatures.
_ATTACHED: Final = ("link", "link_error", "chain")
_HOLDING: Final = frozenset({*_ATTACHED, "chord"})
_STR: Final = frozenset({str})


class Following(msgspec.Struct, frozen=True):
    """What follows on one request, safe to be published by Celery."""

    callbacks: list[dict[str, Any]]
    errbacks: list[dict[str, Any]]
    chain: list[dict[str, Any]]
    chord: dict[str, Any] | None


class _Node:
    """A signature on its way: what was given, and what is made of it."""

    __slots__ = (
        "around", "attached", "body", "built", "chords", "depth", "given", "index", "kind",
        "members", "own", "queued", "size", "within",
    )  # fmt: skip

    def __init__(
        self, given: object, around: _Node | None, within: str, index: int | None, queued: bool
    ) -> None:
        self.given = given
        #: The signature in which it stands, and where in there.
        self.around = around
        self.within = within
        self.index = index
        #: Chords that it is inside of.
        self.depth = self.chords = 0
        if around is not None:
            self.depth = around.depth + 1
            self.chords = around.chords + (around.kind == "chord")
        #: Whether a canvas around it names the queue.
        self.queued = queued
        self.built: dict[str, Any] = {}
        self.kind: str | None = None
        #: Bytes of its own, and with all that is inside.
        self.own = self.size = 0
        #: A group's tasks, a chain's steps, or a chord's header.
        self.members: Sequence[_Node] = ()
        self.body: _Node | None = None
        #: Its links, and the like.
        self.attached: list[_Node] = []

    def place(self) -> str:
        """Where it stands: ``callbacks[0].options.link[2]``."""
        path: list[str] = []
        node: _Node | None = self
        while node is not None:
            path.append(node.within if node.index is None else f"{node.within}[{node.index}]")
            node = node.around
        return ".".join(reversed(path))[-200:]


def _go_on() -> None:
    """Give way to nobody."""


def following(
    embed: Mapping[str, Any],
    message_bytes: int,
    queues: LinkQueues,
    give_way: Callable[[], None] = _go_on,
) -> Following:
    """What `embed`, from a message of so many bytes, has follow.

    `give_way` is called before each signature is read. InvalidInput names what cannot be served;
    PayloadTooLarge: it would be too much to publish.
    """
    walk = _Walk(queues, MAX_FOLLOWING, give_way)
    try:
        return walk.rebuilt(embed, message_bytes)
    finally:
        walk.let_go()


def check_few(embed: Mapping[str, Any], message_bytes: int, queues: LinkQueues) -> None:
    """Raise what `following` would, if no more than `FEW` signatures follow.

    Of more nothing is said: whoever publishes them finds out.
    """
    walk = _Walk(queues, FEW, _go_on)
    try:
        walk.rebuilt(embed, message_bytes)
    except _TooManyToRead:
        pass
    finally:
        walk.let_go()


class _TooManyToRead(Exception):
    """There are more signatures than the walk was to read."""


class _Walk:
    def __init__(self, queues: LinkQueues, most: int, give_way: Callable[[], None]) -> None:
        self._queues = queues
        self._most = most
        self._give_way = give_way
        #: Parents before what is inside of them.
        self._nodes: list[_Node] = []

    def rebuilt(self, embed: Mapping[str, Any], message_bytes: int) -> Following:
        callbacks, errbacks, chain = (
            self._several(embed[name], None, name) if embed.get(name) else []
            for name in ("callbacks", "errbacks", "chain")
        )
        chord = self._one(embed["chord"], None, "chord") if embed.get("chord") else None
        for node in self._nodes:  # which grows meanwhile
            self._give_way()
            try:
                self._build(node)
            except InvalidInput as problem:
                raise InvalidInput(f"{node.place()}: {problem.message}") from None
        # No message holds more than all there is for each signature that it may be a copy for.
        most = len(self._nodes) ** 2 * (message_bytes + _ENVELOPE_BYTES)
        if most > MAX_PUBLISHED_BYTES:
            self._weigh()
            starts = [(node, 0) for node in (*callbacks, *errbacks)]
            if chain:
                starts.append((chain[-1], sum(node.size for node in chain[:-1])))
            if chord is not None:
                starts.append((chord, 0))
            check_bytes(_published(starts), message_bytes)
        return Following(
            [node.built for node in callbacks],
            [node.built for node in errbacks],
            [node.built for node in chain],
            None if chord is None else chord.built,
        )

    def let_go(self) -> None:
        """Leave no circle of references, which only a garbage collection would end."""
        for node in self._nodes:
            node.around = None

    def _one(
        self,
        given: object,
        around: _Node | None,
        within: str,
        index: int | None = None,
        *,
        queued: bool = False,
    ) -> _Node:
        if len(self._nodes) >= self._most:
            if self._most < MAX_FOLLOWING:
                raise _TooManyToRead
            raise InvalidInput(
                f"more than {MAX_FOLLOWING} signatures follow on it; "
                f"expected at most {MAX_FOLLOWING} in all"
            )
        node = _Node(given, around, within, index, queued)
        self._nodes.append(node)
        return node

    def _several(
        self, given: object, around: _Node | None, within: str, *, queued: bool = False
    ) -> list[_Node]:
        if not isinstance(given, list | tuple):
            raise InvalidInput(f"{within} {shown(given)}; expected a list of signatures")
        return [
            self._one(each, around, within, index, queued=queued)
            for index, each in enumerate(given)
        ]

    def _build(self, node: _Node) -> None:
        given = node.given
        if not isinstance(given, dict):
            raise InvalidInput(f"it is {shown(given)}; expected a signature of Celery")
        if node.depth >= MAX_NESTING:
            raise InvalidInput(f"signatures nest more than {MAX_NESTING} deep")
        kind = node.kind = _kind(given)
        task = _task(given) if kind is None else _CANVASES[kind]
        args, kwargs = given.get("args") or [], given.get("kwargs") or {}
        options = given.get("options") or {}
        if not isinstance(args, list | tuple):
            raise InvalidInput(f"args {shown(args)}; expected a list")
        _check_names("kwargs", kwargs)
        _check_names("options", options)
        try:
            plain = rebuilt_options(options, self._queues, groups=kind in _GROUPS)
        except InvalidInput as problem:
            raise InvalidInput(f"options.{problem.message}") from None
        node.built.update(
            task=task,
            args=list(args),
            kwargs={},
            options=plain,
            subtask_type=kind,
            immutable=bool(given.get("immutable")),
        )
        if (size := given.get("chord_size")) is not None:
            node.built["chord_size"] = check_count(size)
        queued = node.queued or "queue" in plain
        if kind is None:
            if not queued:
                self._check_default()
            node.built["kwargs"] = kwargs
        elif kind == "chord":
            self._chord(node, kwargs, queued)
        else:
            node.members = self._several(kwargs.get("tasks"), node, "tasks", queued=queued)
            node.built["kwargs"] = {"tasks": [each.built for each in node.members]}
        self._attach(node, options)

    def _check_default(self) -> None:
        try:
            self._queues.check(_DEFAULT_QUEUE)
        except InvalidInput as problem:
            raise InvalidInput(f"it names no queue, and {problem.message}") from None

    def _chord(self, node: _Node, kwargs: dict[str, Any], queued: bool) -> None:
        if node.chords >= MAX_CHORDS_NESTED:
            raise InvalidInput(f"chords nest more than {MAX_CHORDS_NESTED} deep")
        header, own = kwargs.get("header"), kwargs.get("kwargs") or {}
        _check_names("kwargs.kwargs", own)
        built: dict[str, Any] = {"kwargs": own}
        if isinstance(header, dict):
            node.members = [self._one(header, node, "header", queued=queued)]
            built["header"] = node.members[0].built
        else:
            node.members = self._several(header, node, "header", queued=queued)
            built["header"] = [each.built for each in node.members]
        node.body = self._one(kwargs.get("body"), node, "body", queued=queued)
        built["body"] = node.body.built
        node.built["kwargs"] = built

    def _attach(self, node: _Node, options: dict[str, Any]) -> None:
        built = node.built["options"]
        for name in _ATTACHED:
            if given := options.get(name):
                found = self._several(
                    [given] if isinstance(given, dict) else given, node, f"options.{name}"
                )
                built[name] = [each.built for each in found]
                node.attached += found
        if given := options.get("chord"):
            found = [self._one(given, node, "options.chord")]
            built["chord"] = found[0].built
            node.attached += found

    def _weigh(self) -> None:
        for node in reversed(self._nodes):
            built, inside = node.built, [*node.members, *node.attached]
            own = built["kwargs"] if node.kind is None else built["kwargs"].get("kwargs")
            options = built["options"]
            if node.attached:
                options = {key: options[key] for key in options if key not in _HOLDING}
            node.own = _bytes_of(node, (built["task"], built["args"], own, options))
            if node.body is not None:
                inside.append(node.body)
            node.size = node.own + sum(each.size for each in inside)


def _kind(given: Mapping[Any, Any]) -> str | None:
    kind = given.get("subtask_type") or None
    if kind is not None and (not isinstance(kind, str) or kind not in _CANVASES):
        raise InvalidInput(f"subtask_type {shown(kind)}; expected {', '.join(_CANVASES)}")
    return kind


def _task(given: Mapping[Any, Any]) -> str:
    task = given.get("task")
    if not isinstance(task, str) or not 0 < len(task) <= _MAX_NAME_CHARS:
        raise InvalidInput(f"task {shown(task)}; expected a task's name")
    if task.startswith("celery.") and task != _ACCUMULATE:
        raise InvalidInput(
            f"task {shown(task)} is Celery's own; expected a task of an application, a group, "
            "a chain or a chord"
        )
    return task


def _check_names(field: str, value: object) -> None:
    if not isinstance(value, dict) or not _STR.issuperset(map(type, value)):
        raise InvalidInput(f"{field} {shown(value)}; expected a mapping by names")


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
    """PayloadTooLarge, if so many bytes are more than may follow on a message of `largest`.

    Or if `largest`, of these, is larger than any message may be.
    """
    if largest > MAX_MESSAGE_BYTES:
        raise PayloadTooLarge(
            f"a message of {largest} bytes follows on it; expected at most {MAX_MESSAGE_BYTES}"
        )
    if published > max(MAX_PUBLISHED_BYTES, MAX_COPIES * largest):
        raise PayloadTooLarge(
            f"what follows on it is {published} bytes of messages; expected at most "
            f"{MAX_PUBLISHED_BYTES}, or {MAX_COPIES} times the largest of them"
        )


def _bytes_of(node: _Node, value: object) -> int:
    try:
        return len(pack(value))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.EncodeError) as problem:
        raise InvalidInput(f"{node.place()} cannot be written: {problem}") from problem
