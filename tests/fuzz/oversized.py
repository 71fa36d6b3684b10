"""Headers and properties that are large, nested, or of the wrong type, and ids in broken bytes."""

from __future__ import annotations

import json
import random
from typing import Any

Tree = Any


def large_head(rng: random.Random, tree: Tree) -> Tree:
    """A good request beside whose body much else stands; Celery and kombu would read it all."""
    much: Tree = rng.choice(
        (
            "x" * 40_000,
            "ü" * 5_000,
            [[]] * 10_000,
            [{}] * 10_000,
            10**30,
            {str(n): [n] for n in range(2_000)},
            json.loads("[" * 300 + "]" * 300),
        )
    )
    part = tree[rng.choice(("headers", "headers", "properties"))]
    names = (
        "stamps",
        "kwargsrepr",
        "argsrepr",
        "origin",
        "group",
        "root_id",
        "eta",
        "x",
        "delivery_info",
    )
    part[rng.choice(names)] = much
    return tree


def guessed_id(rng: random.Random, tree: Tree) -> Tree:
    """Bytes that hold an id, and are no envelope: they answer nobody."""
    whole = json.dumps({**tree, "body": ""}, default=repr).encode()
    cut = rng.randint(1, len(whole) - 1)
    return rng.choice(
        (
            whole[:cut],
            whole[cut:],
            b"garbage" + whole,
            whole + b"}",
            whole[:-1] + b"\xff}",
            json.dumps([tree["headers"]]).encode(),
            json.dumps({"body": tree["headers"]}).encode(),
            whole.replace(b'"headers"', b'"headers": ' + b"[" * 2_000, 1),
        )
    )
