"""Other tasks, for the fuzzer: Celery's own, some that unpack to much, and odd ones."""

from __future__ import annotations

import base64
import bz2
import random
import zlib
from typing import Any, Final

#: What Celery registers in every app, and what is registered nowhere.
NAMES: Final = (
    "celery.accumulate", "celery.backend_cleanup", "celery.chain", "celery.chord",
    "celery.chord_unlock", "celery.chunks", "celery.group", "celery.map", "celery.starmap",
    "someone.elses", "inferq.other", "", "\x00", "ü€😀", "x" * 2_000,
)  # fmt: skip
#: Content encodings and compressions, with what packs to little.
BOMBS: Final = {
    "application/x-bz2": bz2.compress(bytes(64 << 20), 1),
    "application/x-gzip": zlib.compress(bytes(64 << 20)),
}


def foreign_task(rng: random.Random, tree: Any) -> Any:
    """A request's envelope made into another task's."""
    headers = tree["headers"]
    headers["task"] = rng.choice(NAMES)
    tree["body"] = [
        rng.choice(([], [1, 2], ["group", {"task": "celery.group", "kwargs": {"tasks": []}}])),
        rng.choice(({}, {"interval": 0.001, "max_retries": None, "result": [[["a", None], None]]})),
        rng.choice((None, {"chord": {"task": "x"}}, {"errbacks": [{"task": "celery.group"}]})),
    ]
    match rng.randrange(8):
        case 0:
            kind = rng.choice(list(BOMBS))
            headers["compression"] = kind
            tree["body"] = base64.b64encode(BOMBS[kind]).decode()
        case 1:
            headers["eta"] = rng.choice(("9999-01-01T00:00:00+00:00", "never", "", 5))
        case 2:
            headers["expires"] = rng.choice(("2020-01-01T00:00:00", "never", 1e300))
        case 3:
            info = rng.choice(({"exchange": "", "routing_key": "inferq:1:later"}, 5, {}, None))
            tree["properties"]["delivery_info"] = info
        case 4:
            tree["properties"]["delivery_tag"] = rng.choice((None, 5, "tag", ["tag"]))
        case 5:
            headers[rng.choice(("retries", "timelimit", "stamps", "group"))] = rng.choice(
                (10**30, -1, "x", [[]], {"a": {}})
            )
        case 6:
            tree["content-type"] = rng.choice(("application/x-python-serialize", "text/plain", ""))
        case _:
            pass
    return tree
