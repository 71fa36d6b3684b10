"""What the parts of a chord came to: read once the last of them has ended, and never waited for.

Where groups stand in a chord's header, Celery itself waits for the result of each part, and for
some of them without an end: whoever may send requests could hold up what follows on all others.
Here a result that is not there by then fails the chord, and so do too many bytes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

import redis
from celery import Celery

from inferq.shared.errors import PayloadTooLarge
from inferq.shared.lua import source
from inferq.workers.canvas import celery_canvas

T = TypeVar("T")

#: Most bytes of the results of a chord's parts, unless it has but one: its body is given all of
#: them in one message. A worker needs some eight times as many bytes to write that.
MAX_CHORD_BYTES: Final = 32 << 20
#: Bytes after which a reply of Redis carries no more of them.
_PIECE_BYTES: Final = 1 << 20
#: Most keys of one command.
_KEYS: Final = 1_000


class Patience(Protocol):
    """Calls what it is given until it succeeds, or no other try would change a thing."""

    def __call__(self, attempt: Callable[[], T], /) -> T: ...


class ChordResults:
    """Reads them by the worker's own connections. `give_way` lets other threads run."""

    def __init__(
        self, client: redis.Redis, patience: Patience, give_way: Callable[[], None]
    ) -> None:
        self._client = client
        self._patience = patience
        self._give_way = give_way
        self._some = client.register_script(source("parts"))

    def of(self, app: Celery, group_id: str) -> list[Any]:
        """The results of that chord's header, in the order and the lists that Celery gives them.

        It raises what a part failed with, as Celery does. PayloadTooLarge: they are too many bytes.
        ChordError: one is missing.
        """
        keys = celery_canvas.chord_keys(app, group_id)
        (saved,) = self._patience(lambda: self._values([keys.header]))
        found: list[tuple[str, Any]] = []
        total = 0
        for raw in self._parts(keys.parts):
            total += len(raw)
            _check(total, len(found) + 1)
            found.append(celery_canvas.chord_part(app, raw, in_groups=saved is not None))
            self._give_way()
        if saved is None:  # no groups
            return [result for _, result in found]
        header = celery_canvas.saved_header(app, saved)
        results = dict(found)
        others = [each for each in header.ids() if each not in results]
        results |= self._stored(app, others, total)
        return header.filled(results)

    def _parts(self, key: str) -> Iterator[bytes]:
        """What Celery keeps for the chord of each part that has ended, by its place."""
        rank = 0
        while some := self._patience(lambda: self._piece(key, rank)):  # noqa: B023 - called at once
            yield from some
            rank += len(some)

    def _piece(self, key: str, rank: int) -> list[bytes]:
        some: list[bytes] = self._some(keys=[key], args=[rank, _PIECE_BYTES])
        return some

    def _stored(self, app: Celery, ids: Sequence[str], total: int) -> dict[str, Any]:
        """The results of parts that the chord was not told of."""
        results: dict[str, Any] = {}
        for at in range(0, len(ids), _KEYS):
            some = ids[at : at + _KEYS]
            keys = [celery_canvas.result_key(app, each) for each in some]
            total += sum(self._patience(lambda: self._sizes(keys)))  # noqa: B023 - called at once
            _check(total, 2)
            found = self._patience(lambda: self._values(keys))  # noqa: B023 - called at once
            for each, raw in zip(some, found, strict=True):
                results[each] = celery_canvas.stored_part(app, each, raw)
                self._give_way()
        return results

    def _sizes(self, keys: Sequence[str]) -> list[int]:
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.strlen(key)
            sizes: list[int] = pipe.execute()
        return sizes

    def _values(self, keys: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = self._client.mget(keys)  # type: ignore[assignment]
        return values


def _check(total: int, parts: int) -> None:
    if parts > 1 and total > MAX_CHORD_BYTES:
        raise PayloadTooLarge(
            f"the results of its parts are more than {MAX_CHORD_BYTES} bytes; expected at most so "
            "many, as its body is given all of them in one message"
        )
