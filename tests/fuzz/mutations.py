"""Messages for the fuzzer: good ones, and what a seeded random generator makes of others.

The same seed gives the same messages, whatever the worker does with them. Messages that mean harm
are made by modules of their own, one for each matter, and registered in `HOSTILE`.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import msgpack
import numpy as np
from helpers.envelopes import JSON, MSGPACK, body, envelope, tensor

from fuzz import canvases
from fuzz.foreign_tasks import foreign_task
from fuzz.nested import nested_lists
from fuzz.oversized import guessed_id, large_head
from inferq.shared.names import Names
from inferq.shared.schema import Array

NAMES = Names()
#: Model → columns of its only input x. One gives it back, the other gives y = 2x.
WIDTHS: Final = {"echo": 4, "double": 3}
#: Where links and chains of the messages go; nobody reads it.
LINKS_QUEUE: Final = canvases.LINKS_QUEUE
GOOD_SHARE: Final = 0.25
#: Earlier messages that are kept to splice others with.
_DONORS: Final = 200
_LONGEST: Final = 60_000
#: Of the messages that are not good, so many are of `HOSTILE`; so many of these are broken besides.
_HOSTILE_SHARE: Final = 1 / 3
_BROKEN_SHARE: Final = 0.2

Tree = Any
#: Makes a message that means harm: from the generator and a good request, as its envelope with the
#: body unpacked (``{"body": [args, kwargs, embed], "headers": …, "properties": …, …}``), which it
#: may change in place. It gives such an envelope again, whose body is packed if it is no text, or
#: bytes, which are pushed as they are. All that is random in it comes of the generator.
Hostile = Callable[[random.Random, Tree], Tree]


def stray_reply(rng: random.Random, tree: Tree) -> Tree:
    """A request that asks for its news on a channel that is no client's."""
    tree["headers"]["inferq_reply"] = rng.choice(
        ("celery-task-meta-other", "/0.celery.pidbox", "inferq:1:later", "", "x" * 20_000, 5, ["a"])
    )
    return tree


#: Kind of message → how often it is made, as against the others, and what makes it.
HOSTILE: Final[dict[str, tuple[int, Hostile]]] = {
    "stray reply": (1, stray_reply),
    "nested lists": (2, nested_lists),
    "large head": (1, large_head),
    "guessed id": (1, guessed_id),
    "foreign task": (2, foreign_task),
    "link options": (2, canvases.options),
    "link queues": (2, canvases.queues),
    "link builtins": (1, canvases.builtins),
    "many links": (1, canvases.many),
    "deep links": (1, canvases.deep),
    "chord joins": (1, canvases.joins),
}


@dataclass(frozen=True)
class Message:
    """One message, its queue, and for a good one what is to come out."""

    model: str
    step: int
    raw: bytes
    good_id: str | None = None
    expected: Array | None = None
    #: Key and value to be set before it is pushed.
    payload: tuple[str, bytes] | None = None
    #: Its name in `HOSTILE`, "good", or "broken".
    kind: str = "broken"


class Messages:
    """An endless stream of messages; `next` makes one."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._donors: list[bytes] = []

    def next(self) -> Message:
        rng = self._rng
        model = rng.choice(list(WIDTHS))
        step = rng.choice(NAMES.priority_steps)
        x = np.full((rng.randint(1, 3), WIDTHS[model]), rng.randint(0, 1 << 20), np.float32)
        request_id = "".join(rng.choices("0123456789abcdef", k=32))
        good = rng.random() < GOOD_SHARE
        raw, payload = self._request(request_id, model, x, plain=good)
        if good:
            expected = x if model == "echo" else 2 * x
            return Message(model, step, raw, request_id, expected, payload, "good")
        if HOSTILE and rng.random() < _HOSTILE_SHARE:
            return self._hostile(model, step, request_id, x)
        self._donors.append(raw)
        if len(self._donors) > _DONORS:
            self._donors.pop(rng.randrange(_DONORS))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            raw = self._mutated(raw)[:_LONGEST]
        return Message(model, step, raw, payload=payload)

    def _hostile(self, model: str, step: int, request_id: str, x: Array) -> Message:
        rng = self._rng
        (name,) = rng.choices(list(HOSTILE), [weight for weight, _ in HOSTILE.values()])
        tree = json.loads(envelope(b"", request_id=request_id))
        tree["body"] = [[], {"model": model, "inputs": {"x": tensor(x)}}, None]
        made = HOSTILE[name][1](rng, tree)
        raw = made if isinstance(made, bytes) else _sealed(made)
        if rng.random() < _BROKEN_SHARE and self._donors:
            raw = self._mutated(raw)
        return Message(model, step, raw, kind=name)

    def _request(
        self, request_id: str, model: str, x: Array, *, plain: bool
    ) -> tuple[bytes, tuple[str, bytes] | None]:
        """A good request; `plain`: with nothing that follows on it, and now rather than later."""
        rng = self._rng
        key = NAMES.payload(request_id, "x")
        payload = (key, x.tobytes()) if rng.random() < 0.2 else None
        wire: Tree = tensor(x, data=..., key=key) if payload else tensor(x)
        kind = MSGPACK if payload else rng.choice((MSGPACK, MSGPACK, JSON))
        if kind == JSON:
            wire = rng.choice(
                (x.tolist(), {**wire, "data": base64.b64encode(x.tobytes()).decode()})
            )
        kwargs = {"model": model, "inputs": {"x": wire}}
        headers: dict[str, Any] = {
            "lang": "py", "retries": 0, "eta": None, "expires": None, "group": None,
            "root_id": request_id, "parent_id": None, "ignore_result": False, "kwargsrepr": "x",
            "timelimit": [None, None], "origin": "fuzz", "stamps": {}, "compression": None,
            "inferq_reply": NAMES.reply("fuzz"), "inferq_sent_ms": 1.0, "inferq_deadline_ms": None,
        }  # fmt: skip
        embed: dict[str, Any] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
        if not plain:
            headers |= rng.choice(
                (
                    {}, {}, {}, {"eta": "2020-01-01T00:00:00+00:00"},
                    {"expires": "2099-01-01T00:00:00"}, {"group": "fuzz", "group_index": 1},
                    {"task": "celery.accumulate"}, {"inferq_deadline_ms": 1e15},
                )
            )  # fmt: skip
            if rng.random() < 0.2:
                embed[rng.choice(list(embed))] = [self._link() for _ in range(rng.randint(1, 3))]
        args: list[Any] = [kwargs["inputs"], model] if rng.random() < 0.2 else []
        kwargs = {} if args else kwargs
        content = [args, kwargs, embed]
        packed = (
            json.dumps(content).encode() if kind == JSON else body(kwargs, args=args, embed=embed)
        )
        return envelope(packed, kind=kind, headers=headers, request_id=request_id), payload

    def _link(self) -> dict[str, Any]:
        return {
            "task": "fuzz.link",
            "args": [],
            "kwargs": {},
            "immutable": False,
            "options": {"queue": LINKS_QUEUE, "task_id": f"link{self._rng.getrandbits(64):x}"},
            "subtask_type": None,
        }

    # --- mutations ------------------------------------------------------------------------------

    def _mutated(self, raw: bytes) -> bytes:
        mutate = self._rng.choice(
            (
                self._flip, self._cut, self._without, self._repeat, self._insert, self._splice,
                self._noise, self._field, self._field, self._field, self._body, self._body,
                self._body, self._packed, self._packed, self._nest,
            )
        )  # fmt: skip
        return mutate(raw)

    def _flip(self, raw: bytes) -> bytes:
        changed = bytearray(raw)
        for _ in range(self._rng.randint(1, 8) if changed else 0):
            changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)

    def _cut(self, raw: bytes) -> bytes:
        return raw[: self._rng.randint(0, len(raw))]

    def _span(self, raw: bytes) -> tuple[int, int]:
        start = self._rng.randint(0, len(raw))
        return start, min(len(raw), start + self._rng.choice((1, 2, 4, 16, 256)))

    def _without(self, raw: bytes) -> bytes:
        start, end = self._span(raw)
        return raw[:start] + raw[end:]

    def _repeat(self, raw: bytes) -> bytes:
        start, end = self._span(raw)
        return raw[:end] + raw[start:end] * self._rng.choice((1, 2, 50)) + raw[end:]

    def _insert(self, raw: bytes) -> bytes:
        start, _ = self._span(raw)
        return raw[:start] + self._rng.randbytes(self._rng.choice((1, 4, 64))) + raw[start:]

    def _splice(self, raw: bytes) -> bytes:
        donor = self._rng.choice(self._donors)
        start, end = self._rng.randint(0, len(raw)), self._rng.randint(0, len(donor))
        return raw[:start] + donor[end:]

    def _noise(self, raw: bytes) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 10, 1000, 50_000)))

    def _nest(self, raw: bytes) -> bytes:
        start, _ = self._span(raw)
        opening = self._rng.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a"))
        return raw[:start] + opening * self._rng.choice((10, 900, 1000, 10_000)) + raw[start:]

    def _field(self, raw: bytes) -> bytes:
        """Change the envelope in one place."""
        return self._parsed(raw, self._changed)

    def _body(self, raw: bytes) -> bytes:
        """Change the task's arguments, or what follows on it, in one place."""

        def change(packed: bytes, kind: object) -> bytes:
            if kind == JSON:
                return _dumped(self._changed(json.loads(packed)))
            tree = msgpack.unpackb(packed, strict_map_key=False)
            return cast(bytes, msgpack.packb(self._changed(tree)))

        return self._repacked(raw, change)

    def _packed(self, raw: bytes) -> bytes:
        """Change the body's bytes: lengths that are off, codes that are none."""
        mutate: Callable[[bytes], bytes] = self._rng.choice(
            (self._flip, self._cut, self._without, self._repeat, self._insert, self._nest)
        )
        return self._repacked(raw, lambda packed, kind: mutate(packed))

    def _repacked(self, raw: bytes, change: Callable[[bytes, object], bytes]) -> bytes:
        def wrapped(tree: Tree) -> Tree:
            packed = base64.b64decode(tree["body"])
            tree["body"] = base64.b64encode(change(packed, tree["content-type"])).decode()
            return tree

        return self._parsed(raw, wrapped)

    def _parsed(self, raw: bytes, change: Callable[[Tree], Tree]) -> bytes:
        try:
            return _dumped(change(json.loads(raw)))
        except Exception:  # noqa: BLE001 - a former mutation has broken it already
            return self._flip(raw)

    def _changed(self, tree: Tree) -> Tree:
        places = _places(tree)
        if not places:
            return self._value()
        holder, key = self._rng.choice(places)
        match self._rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[self._text()] = holder.pop(key)
            case 2:
                holder[key] = [holder[key]] * self._rng.choice((1, 2, 500))
            case 3:
                holder[key] = json.loads(json.dumps(self._rng.choice(places)[0], default=repr))
            case _:
                holder[key] = self._value()
        return tree

    def _text(self) -> str:
        rng = self._rng
        return rng.choice(
            (
                "", "id", "x", "data", "key", "dtype", "shape", "O", "<f8", ">f4", "\x00", "\n",
                "../..", "a:b", "ü€😀", "NaN", "inferq.infer", "application/x-python-serialize",
                "celery-task-meta-other", "unrelated", "9999-12-31T23:59:59+00:00", "-1",
                "x" * rng.choice((100, 1001, 20_000)),
            )
        )  # fmt: skip

    def _value(self) -> Tree:
        rng = self._rng
        match rng.randrange(8):
            case 0:
                return rng.choice((None, True, False, [], {}))
            case 1:
                sign = rng.choice((1, -1))
                return sign * rng.choice((0, 1, 2, 17, 2**31, 2**53, 2**63 - 1))
            case 2:
                return rng.choice((0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), 1e-320))
            case 3 | 4:
                return self._text()
            case 5:
                return [self._value() for _ in range(rng.randint(1, 4))]
            case 6:
                return {self._text(): self._value() for _ in range(rng.randint(1, 4))}
            case _:
                nested: Tree = None
                for _ in range(rng.choice((5, 100, 400))):
                    nested = [nested] if rng.random() < 0.5 else {"a": nested}
                return nested


def _sealed(tree: Tree) -> bytes:
    """An envelope with its body packed."""
    if not isinstance(tree["body"], str):
        tree = {**tree, "body": base64.b64encode(msgpack.packb(tree["body"])).decode()}
    return _dumped(tree)


def _dumped(tree: Tree) -> bytes:
    return json.dumps(tree, default=repr).encode()


def _places(tree: Tree) -> list[tuple[Any, Any]]:
    """Every key of a mapping and index of a list in `tree`, with what holds it."""
    found: list[tuple[Any, Any]] = []
    inside = [tree]
    while inside:
        holder = inside.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            found += [(holder, key) for key in keys]
            inside += [holder[key] for key in keys]
    return found
