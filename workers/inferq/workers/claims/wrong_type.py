"""Keys that hold another Redis type than expected: reported once, never deleted, checked again.

Anybody who may write to Redis can put a string where a model's queue belongs. Then only what that
key is for stops, until an operator removes the key. inferq deletes nothing that it did not write.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import redis
from redis.exceptions import ResponseError

from inferq.shared.names import Names
from inferq.shared.resp import ReplyError

logger = logging.getLogger(__name__)

LIST: Final = "list"
HASH: Final = "hash"
SET: Final = "set"
ZSET: Final = "zset"
STRING: Final = "string"
#: Most keys that are remembered as reported.
MAX_REPORTED: Final = 1_000


def is_wrong_type(problem: object) -> bool:
    """Whether Redis refused a command, or one in a script, since its key has another type."""
    return isinstance(problem, ResponseError | ReplyError) and "WRONGTYPE" in str(problem)


@dataclass(frozen=True)
class WrongType:
    """`key` is a `found` and should be an `expected`. `effect`: what stops until it is removed."""

    key: str
    found: str
    expected: str
    effect: str

    def __str__(self) -> str:
        return (
            f"key {self.key!r} is a {self.found}; expected a {self.expected}. {self.effect} "
            f"until it is removed: DEL it, or RENAME it if it is needed"
        )


class WrongTypeReports:
    """Logs each key once when it has the wrong type, and once when it is right again.

    For one thread."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def report(self, key: str, found: str, expected: str, effect: str) -> None:
        """`effect`: a sentence, on which "until it is removed" follows."""
        if key not in self._keys and found not in (expected, "none"):  # it may be right by now
            self.note(key)
            logger.error("%s", WrongType(key, found, expected, effect))

    def note(self, key: str) -> None:
        """Remember that `key`, or something in it, was reported."""
        self._keys[key] = None
        if len(self._keys) > MAX_REPORTED:
            del self._keys[next(iter(self._keys))]

    def resolve(self, key: str) -> bool:
        """Note that `key` is as it should be. True if it had been reported."""
        if key not in self._keys:
            return False
        del self._keys[key]
        logger.warning("key %r is right again", key)
        return True


def type_of(client: redis.Redis, key: str | bytes) -> str:
    """Redis' name of the type of `key`; "none": it does not exist."""
    kind = client.type(key)
    return kind.decode() if isinstance(kind, bytes) else str(kind)


def find_wrong_types(client: redis.Redis, names: Names, models: Sequence[str]) -> list[WrongType]:
    """The keys of `models`, and those all models share, of the wrong type. Raises redis' errors."""
    wanted = [*_shared(names), *(each for model in models for each in _of_model(names, model))]
    with client.pipeline(transaction=False) as pipe:
        for key, *_ in wanted:
            pipe.type(key)
        kinds = pipe.execute()
    found = ((kind.decode(), *each) for kind, each in zip(kinds, wanted, strict=True))
    return [
        WrongType(key, kind, expected, effect)
        for kind, key, expected, effect in found
        if kind not in (expected, "none")
    ]


#: What stops while such a key has the wrong type.
NOTHING_CLAIMED: Final = "Nothing is claimed from it, nor put back into it,"
NO_ATTEMPTS: Final = "Requests that end their worker are not counted"
NO_DEAD_LETTERS: Final = "Dead letters of this model are not kept"
NO_ANNOUNCEMENT: Final = "Clients do not know which workers serve this model"
NO_RETURN: Final = "Requests with an ETA wait"
NO_RECOVERY: Final = "What dead workers held is not put back"


def _shared(names: Names) -> Iterator[tuple[str, str, str]]:
    for each in names.all_protocols():
        yield each.scheduled, ZSET, NO_RETURN
        yield each.leases, ZSET, NO_RECOVERY


def _of_model(names: Names, model: str) -> Iterable[tuple[str, str, str]]:
    for step in names.priority_steps:
        yield names.queue(model, step), LIST, NOTHING_CLAIMED
    for each in names.all_protocols():
        yield each.attempts(model), HASH, NO_ATTEMPTS
        yield each.dead(model), LIST, NO_DEAD_LETTERS
        yield each.serving(model), ZSET, NO_ANNOUNCEMENT
        yield each.model(model), STRING, NO_ANNOUNCEMENT
