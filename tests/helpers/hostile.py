"""Messages that mean harm or are broken in one part, and how each of them ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np

from helpers.envelopes import JSON, body, envelope, request, tensor
from helpers.repository import numbered
from inferq.shared.codec.messages import MAX_ID_CHARS
from inferq.shared.names import Names
from inferq.workers.canvas.following import MAX_FOLLOWING

NAMES = Names()
#: Of the model m, to which they are sent.
MAX_REQUEST_BYTES: Final = 256
LONG = "x" * 1_000_000
MANY: Final = 20_000
X = tensor(numbered(1))
#: Keys that no request may read, change or delete.
FOREIGN_KEYS: Final = (
    "celery-task-meta-other",
    NAMES.payload("another", "x"),
    NAMES.payload("user:42", "x"),
    "unrelated",
)

#: Kept as a dead letter, and nobody is told: nobody is named by an envelope.
QUARANTINED: Final = "quarantined"
SUCCESS: Final = "SUCCESS"


@dataclass(frozen=True)
class Hostile:
    """A message, and how it ends: a status, an error's class, or QUARANTINED."""

    ends: str
    raw: bytes


def asked(inputs: object, **given: Any) -> bytes:
    return envelope(body({"inputs": inputs}), **given)


def of_x(**changed: Any) -> bytes:
    return asked({"x": {**X, **changed}})


def packed(raw: bytes) -> bytes:
    """A message whose msgpack is written by hand."""
    return envelope(raw)


def inside(raw: bytes) -> bytes:
    """The msgpack `raw` in the place of the input x."""
    return envelope(b"\x93\x90\x81\xa6inputs\x81\xa1x" + raw + b"\xc0")


def failing(embed: object) -> bytes:
    """A request that fails, with something to follow."""
    return envelope(body({"inputs": {}}, embed=embed))


def unescaped(raw: bytes, old: bytes, new: bytes) -> bytes:
    """`raw` with JSON that Python would not write."""
    assert old in raw
    return raw.replace(old, new)


def links(count: int) -> list[dict[str, Any]]:
    """Signatures as Celery sends them, to a queue that nobody reads."""
    return [
        {
            "task": "nobody.knows", "args": [], "kwargs": {}, "subtask_type": None,
            "immutable": False, "options": {"queue": "nobody", "task_id": f"link {n}"},
        }
        for n in range(count)
    ]  # fmt: skip


CONTENT: Mapping[str, Hostile] = {
    "pickle": Hostile(
        "InvalidInput", envelope(b"cos\nabort\n(tR.", kind="application/x-python-serialize")
    ),
    "pickle named otherwise": Hostile("InvalidInput", envelope(b"cos\nabort\n(tR.", kind="pickle")),
    "yaml": Hostile(
        "InvalidInput", envelope(b"!!python/object/apply:os.abort []", kind="application/x-yaml")
    ),
    "pickle as msgpack": Hostile("InvalidInput", packed(b"cos\nabort\n(tR.")),
    "long content type": Hostile("InvalidInput", request(1, kind=LONG)),
    "no content type": Hostile("InvalidInput", envelope(b"", kind="")),
    "content type null": Hostile("DeadLettered", request(1, **{"content-type": None})),
    "gzip": Hostile("InvalidInput", request(1, headers={"compression": "application/x-gzip"})),
    "compression long": Hostile("InvalidInput", request(1, headers={"compression": LONG})),
    "body encoding": Hostile("InvalidInput", request(1, properties={"body_encoding": "rot13"})),
    "body a number": Hostile("InvalidInput", request(1, body=5)),
    "body nested": Hostile("InvalidInput", request(1, body={"a": [{}]})),
}

SHAPES: list[object] = [
    [-1, 4], [-1, -4], [2**62, 4], [2**63, 2**63], [2**64 - 1], [0, 2**63], [1] * 17,
    [1.0, 4], [True, 4], [None], "1,4", 4, None, {}, {"0": 1}, [[1, 4]], [1, 4, 1], [4], [],
    [float("nan"), 4], list(range(MANY)), LONG,
]  # fmt: skip
DTYPES: list[object] = [
    "O", "|O", "object", "V16", "M8[ns]", ">f4", "<U4", "f4,f4", "<f4\x00", "", LONG, None, 4,
    ["<f4"], {"<f4": 1}, b"<f4", "<i4",
]  # fmt: skip
DATA: list[object] = [
    b"", bytes(15), bytes(17), bytes(1 << 16), None, 5, "text", "AAAA", LONG, {}, {"__type__": 1},
    {"__type__": "base64", "__value__": "!"}, [], [[1, 2], [3]], [["a"] * 4], [[None] * 4],
    [[2.0**200] * 4], [b"1234"], [[{}] * 4], msgpack.ExtType(5, bytes(16)), msgpack.Timestamp(1),
]  # fmt: skip

BOMBS: Mapping[str, Hostile] = {
    "empty": Hostile("InvalidInput", packed(b"")),
    "cut": Hostile("InvalidInput", packed(body({"inputs": {"x": X}})[:-9])),
    "more behind": Hostile("InvalidInput", packed(body({"inputs": {"x": X}}) + b"\xc0")),
    "4 billion items": Hostile("InvalidInput", inside(b"\xdd\xff\xff\xff\xff")),
    "4 billion keys": Hostile("InvalidInput", inside(b"\xdf\xff\xff\xff\xff")),
    "4 billion bytes": Hostile("InvalidInput", inside(b"\xc6\xff\xff\xff\xff")),
    "4 billion characters": Hostile("InvalidInput", inside(b"\xdb\xff\xff\xff\xff")),
    "an extension of 4 billion": Hostile("InvalidInput", inside(b"\xc9\xff\xff\xff\xff\x05")),
    "a code that is none": Hostile("InvalidInput", inside(b"\xc1")),
    "text that is none": Hostile("InvalidInput", inside(b"\xa2\xff\xfe")),
    "deep lists": Hostile("InvalidInput", inside(b"\x91" * MANY + b"\xc0")),
    "deep maps": Hostile("InvalidInput", inside(b"\x81\xa1a" * MANY + b"\xc0")),
    "a map as a key": Hostile("InvalidInput", inside(b"\x81\x80\x01")),
    "a million maps": Hostile("InvalidInput", inside(b"\xdd\x00\x0f\x42\x40" + b"\x80" * 10**6)),
    "many inputs": Hostile("InvalidInput", asked({f"n{n}": X for n in range(MANY)})),
    "many references": Hostile(
        "InvalidInput",
        asked({f"n{n}": {"dtype": "<f4", "shape": [], "key": "unrelated"} for n in range(MANY)}),
    ),
    "a long name": Hostile("InvalidInput", asked({LONG: X})),
    "many arguments": Hostile("InvalidInput", envelope(body({f"n{n}": 1 for n in range(MANY)}))),
    "many positions": Hostile("InvalidInput", envelope(body({}, args=[X] * 10_000))),
    "deep JSON": Hostile("InvalidInput", envelope(b"[" * MANY, kind=JSON)),
    "long number": Hostile(
        "InvalidInput", envelope(b'[[],{"inputs":{"x":%s}},null]' % (b"9" * 5000), kind=JSON)
    ),
    "half a surrogate": Hostile(
        "InvalidInput", envelope(b'[[],{"inputs":{"\\ud800":1}},null]', kind=JSON)
    ),
    "too large": Hostile("PayloadTooLarge", asked({"x": tensor(np.zeros((32, 4), np.float32))})),
    "far too large": Hostile("PayloadTooLarge", asked({"x": {**X, "data": bytes(20 << 20)}})),
    "zeros": Hostile("PayloadTooLarge", packed(bytes(20 << 20))),
    "20 million maps": Hostile(
        "PayloadTooLarge", inside(b"\xdd\x01\x31\x2d\x00" + b"\x80" * (20 * 10**6))
    ),
}

NO_MESSAGES: Mapping[str, Hostile] = {
    name: Hostile(QUARANTINED, raw)
    for name, raw in {
        "nothing": b"",
        "zeros": bytes(8 << 20),
        "brackets": b"[" * 10**6,
        "braces": b'{"a":' * 10**6,
        "half a message": envelope(b"", headers={"id": 5})[:50],
        "UTF-16": request(1, headers={"id": "a"}).decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + request(1, headers={"id": "ä"}),
        "a number": b"1e999",
        "a list of messages": b"[" + request(1, headers={"id": "ä"}) + b"]",
    }.items()
}

GOOD_IDS = [
    "a/b/../../c", "..", "line\nbreak\r\n", "nul\x00nul", '"quoted"\\', "ü€😀", "%s%n{0}", "a:b:c",
    " ", "*", "m/" + "0" * 36, "i" * MAX_ID_CHARS, "-1", "null",
]  # fmt: skip
BAD_IDS: list[object] = ["", LONG, "i" * (MAX_ID_CHARS + 1), 5, None, [], {"id": []}, True, 1e300]


def headers(ends: str, names: str, *values: object) -> dict[str, Hostile]:
    """Requests, good but for each of the headers `names` in turn, which is each of `values`."""
    return {
        f"{name} {value!r:.40}": Hostile(ends, request(1, headers={name: value}))
        for name in names.split()
        for value in values
    }


def priorities(ends: str, *values: object) -> dict[str, Hostile]:
    return {
        f"priority {value!r:.40}": Hostile(ends, request(1, properties={"priority": value}))
        for value in values
    }


def embedded(ends: str, names: str, *values: object) -> dict[str, Hostile]:
    return {
        f"{name} {value!r:.40}": Hostile(ends, request(1, embed={name: value}))
        for name in names.split()
        for value in values
    }


HEADERS: Mapping[str, Hostile] = {
    "half a surrogate as id": Hostile(QUARANTINED, request(1, headers={"id": "\ud800"})),
    **headers(
        "InvalidInput",
        "inferq_reply",
        "",
        "celery-task-meta-other",
        "unrelated",
        "inferq:1:reply",
        "\x00",
    ),
    **headers("DeadLettered", "inferq_reply", LONG, NAMES.reply(LONG), 5, []),
    **headers(SUCCESS, "inferq_reply", NAMES.reply("\n\x00")),
    **headers("DeadLettered", "group parent_id root_id", 5, [], {"x": "other"}, LONG, True),
    **headers("DeadLettered", "eta expires", 5, 1e300, float("nan"), float("-inf"), [], {"eta": 1}),
    **headers(
        "InvalidInput",
        "eta expires",
        "",
        "99999-01-01T00:00:00",
        "-0001-01-01",
        "NaN",
        "2026-13-01",
        LONG,
        "now",
    ),
    "eta in the year 1": Hostile(SUCCESS, request(1, headers={"eta": "0001-01-01T00:00:00+23:59"})),
    "expires in the year 1": Hostile(
        "TaskRevokedError", request(1, headers={"expires": "0001-01-01T00:00:00+23:59"})
    ),
    "expires in the year 9999": Hostile(
        SUCCESS, request(1, headers={"expires": "9999-12-31T23:59:59-23:59"})
    ),
    **headers(
        "DeadLettered",
        "inferq_sent_ms inferq_deadline_ms",
        float("nan"),
        float("inf"),
        "soon",
        [],
        True,
        10**400,
    ),
    **headers(SUCCESS, "inferq_sent_ms", 1.7e308, -1.7e308),
    **headers(SUCCESS, "inferq_deadline_ms", 1.7e308),
    **headers("DeadlineExceeded", "inferq_deadline_ms", -1.7e308),
    "deadline beyond floats": Hostile(
        "DeadLettered",
        unescaped(request(1, headers={"inferq_deadline_ms": 4711}), b"4711", b"1e999"),
    ),
    **priorities(SUCCESS, -(2**31), 255, 10**30, None),
    **priorities("DeadLettered", "high", 1.5, [], float("nan")),
    **headers(SUCCESS, "retries", 10**30, -1),
    "unknown header, long": Hostile(SUCCESS, request(1, headers={"stamps": {"a": LONG}})),
    "unknown header, nested": Hostile(
        QUARANTINED,
        unescaped(request(1, headers={"x": 4711}), b"4711", b"[" * MANY + b"]" * MANY),
    ),
    "long repr": Hostile(SUCCESS, request(1, headers={"kwargsrepr": LONG})),
    "properties of the wrong type": Hostile(
        "DeadLettered", request(1).replace(b'"properties": {', b'"properties": 5, "others": {')
    ),
}

CANVAS: Mapping[str, Hostile] = {
    **embedded(
        "InvalidInput",
        "callbacks errbacks chain",
        5,
        True,
        "text",
        [5],
        [None],
        [[]],
        ["x"],
        [{}],
        [{"task": 5}],
        [{"task": "x", "options": 5}],
        [{"task": "x", "args": 5}],
        [b"\xff"],
        [{"subtask_type": "group"}],
        [{"subtask_type": "chord", "task": "celery.chord"}],
    ),
    "errbacks of a failure": Hostile("InvalidInput", failing({"errbacks": [5]})),
    "chain of a failure": Hostile("InvalidInput", failing({"chain": [5]})),
    "embed a list": Hostile("InvalidInput", envelope(body({"inputs": {"x": X}}, embed=[1]))),
    "embed a number": Hostile("InvalidInput", envelope(body({"inputs": {"x": X}}, embed=1))),
    "a long chain": Hostile(SUCCESS, request(1, embed={"chain": links(MAX_FOLLOWING)})),
    **{
        f"too many {name}": Hostile("InvalidInput", request(1, embed={name: links(MANY)}))
        for name in ("callbacks", "errbacks", "chain")
    },
    "a long chain of a failure": Hostile("InvalidInput", failing({"chain": links(MAX_FOLLOWING)})),
    "many errbacks of a success": Hostile(
        SUCCESS, request(1, embed={"errbacks": links(MAX_FOLLOWING)})
    ),
    **embedded("InvalidInput", "chord", 5, "text", {"kwargs": {"body": {}}}),
    **embedded(SUCCESS, "chord", {"task": "nope"}),
    "a chord of a group that is none": Hostile(
        SUCCESS, request(1, headers={"group": "none"}, embed={"chord": {"task": "nope"}})
    ),
    **{
        f"an index in its group {index!r}": Hostile(
            "InvalidInput",
            request(
                1, headers={"group": "g", "group_index": index}, embed={"chord": {"task": "x"}}
            ),
        )
        for index in ({"no": 1}, "x", -1, 1.5, 10**30)
    },
}

TABLE: Mapping[str, Hostile] = {
    **CONTENT,
    **{f"shape {s!r:.40}": Hostile("InvalidInput", of_x(shape=s)) for s in SHAPES},
    **{f"dtype {d!r:.40}": Hostile("InvalidInput", of_x(dtype=d)) for d in DTYPES},
    **{f"data {n} {d!r:.40}": Hostile("InvalidInput", of_x(data=d)) for n, d in enumerate(DATA)},
    **{f"inputs {i!r:.40}": Hostile("InvalidInput", asked(i)) for i in (5, "x", [X], None, {1: X})},
    "another model": Hostile("ModelNotFound", envelope(body({"inputs": {}, "model": "../m"}))),
    "a model that is none": Hostile(
        "ModelNotFound", envelope(body({"inputs": {}, "model": [LONG]}))
    ),
    **{f"bomb: {name}": case for name, case in BOMBS.items()},
    **{f"no message: {name}": case for name, case in NO_MESSAGES.items()},
    **{f"id {i!r:.40}": Hostile(SUCCESS, request(1, headers={"id": i})) for i in GOOD_IDS},
    **{f"no id {i!r:.40}": Hostile(QUARANTINED, request(1, headers={"id": i})) for i in BAD_IDS},
    **HEADERS,
    **{f"canvas: {name}": case for name, case in CANVAS.items()},
}
