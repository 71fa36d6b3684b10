"""Nested lists in the place of a tensor: of strings, too deep, too many, ragged."""

from __future__ import annotations

import random
from typing import Any, Final

Tree = Any

#: Leaves that are no number, or none that a float holds.
_ODD: Final[tuple[Any, ...]] = (
    "a", "b" * 5_000, "", None, {}, {"": {}}, [], [[]], True, 2**63, 2**64 - 1, 1e308, "NaN",
    "application/x-msgpack",
)  # fmt: skip


def nested_lists(rng: random.Random, tree: Tree) -> Tree:
    """A good request of which one input is made of lists that NumPy should never see."""
    args, kwargs, _ = tree["body"]
    inputs = args[0] if args else kwargs["inputs"]
    lists = rng.choice((_strings, _wide, _deep, _ragged, _odd, _heavy))(rng)
    if rng.random() < 0.3:
        lists = {
            "dtype": rng.choice(("<f4", "float32", "|b1", "O", lists)),
            "data": lists,
            "shape": rng.choice(([1, 4], [2**31, 2**31], [-1], lists, None)),
        }
    inputs[rng.choice(["x", "x", "y"])] = lists
    return tree


def _strings(rng: random.Random) -> Tree:
    """Short ones beside a long one: NumPy takes memory for their product."""
    return ["a"] * rng.choice((10, 3_000)) + ["b" * rng.choice((10, 20_000))]


def _wide(rng: random.Random) -> Tree:
    return [rng.choice(([], {}, [[]], [0]))] * rng.choice((1, 100, 5_000))


def _deep(rng: random.Random) -> Tree:
    lists: Tree = rng.choice((1.0, "x", [], None))
    for _ in range(rng.choice((3, 16, 17, 65, 400))):
        lists = [lists]
    return lists


def _ragged(rng: random.Random) -> Tree:
    return [[1.0] * rng.choice((4, 4, 3, 0)) for _ in range(rng.randint(1, 3))] + [
        rng.choice(([1.0] * 5, 1.0, [[1.0] * 4]))
    ]


def _odd(rng: random.Random) -> Tree:
    row: Tree = [1.0, 2.0, 3.0]
    row.insert(rng.randrange(4), rng.choice(_ODD))
    return [row] * rng.randint(1, 3)


def _heavy(rng: random.Random) -> Tree:
    """Maps in maps: of msgpack, one byte may be a hundred in memory."""
    chain: Tree = 0
    for _ in range(100):
        chain = {"": chain}
    return [chain] * rng.choice((1, 20, 100))
