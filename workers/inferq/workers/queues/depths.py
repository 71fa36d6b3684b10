"""Reads how many requests of each model wait, and where, from Redis alone, without a worker.

A reading takes at most four round trips, however many requests wait: it asks for lengths, and no
message leaves Redis (see oldest.lua). Of the scheduled requests, the models of the first
`LATER_PLACES` are read. A key of the wrong type counts as empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import redis

from inferq.shared import codec
from inferq.shared.errors import ConfigError
from inferq.shared.lua import source
from inferq.shared.names import ClaimName, Names, glob_of, is_model_name, model_of
from inferq.shared.schema import ModelAdvert
from inferq.workers.claims import replies

#: Most scheduled requests whose model is read: those that are due first.
LATER_PLACES: Final = 10_000
#: Most models that are listed although no worker is known to have served them: anybody who may push
#: can make any number of queues.
STRAYS: Final = 10_000
#: Share of max_queue_depth from which on a queue counts as nearly full.
NEAR: Final = 0.8
#: Keys that Redis visits for one reply to SCAN.
_SCAN_COUNT: Final = 1000
#: The answer of `oldest.lua` for an empty queue.
_EMPTY: Final = b"none"


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """The waiting requests of one model."""

    model: str
    #: Requests in the queue: in all, and by priority step.
    depth: int
    by_priority: Mapping[int, int]
    #: Seconds since the oldest of the requests that are claimed next was sent. None: the queue is
    #: empty, or they do not say, like requests of a stock Celery app.
    oldest_age_s: float | None
    #: Scheduled requests, among the first `LATER_PLACES` of all models.
    later: int
    #: Requests that workers hold: they compute, or are about to.
    claimed: int
    dead: int
    #: Live workers that serve the model.
    consumers: int
    #: None: no limit, or not known because no worker announced the model in the last day.
    max_queue_depth: int | None
    #: Whether the depth is at least `NEAR` of the limit.
    near_limit: bool


class Depths(msgspec.Struct, frozen=True, kw_only=True):
    """One reading. `later_unread`: scheduled requests whose model was not read.

    `unlisted`: further models, beyond `STRAYS`, that have a queue and that no worker announced.
    """

    models: Sequence[Depth]
    later_unread: int
    unlisted: int = 0


class KnownModels(msgspec.Struct, frozen=True, kw_only=True):
    """The models that Redis knows of, each list sorted."""

    #: Models that a worker announced in the last day, or of which it left keys.
    known: Sequence[str]
    #: Models that only have a queue, at most `STRAYS`; and the number of further queues.
    strays: Sequence[str]
    unlisted: int


class DepthReader:
    """Reads the depths in one Redis. Its methods raise redis' errors."""

    def __init__(self, client: redis.Redis, names: Names) -> None:
        self._client = client
        self._names = names
        self._oldest = client.register_script(source("oldest"))

    def models(self) -> list[str]:
        """The models that have a queue, dead letters, an announcement or a worker; see `find`.

        Models that workers know come first.
        """
        found = self.find()
        return [*found.known, *found.strays]

    def find(self) -> KnownModels:
        """Find all models by the names of all keys (SCAN, twice).

        That takes about a second for a million keys.
        """
        known: set[str] = set()
        for names in self._names.all_protocols():
            heads = (names.dead(""), names.model(""), names.serving(""))
            for key in self._scan(names.root, "[dms]*"):
                known |= {key.removeprefix(head) for head in heads if key.startswith(head)}
            with self._client.pipeline(transaction=False) as pipe:
                pipe.zrange(names.scheduled, 0, LATER_PLACES - 1)
                [places] = replies.of_each(pipe)
            known |= {_model_of_place(place) for place in places or ()}
        strays: set[str] = set()
        unlisted = 0
        for key in self._scan(self._names.prefix, "inferq.*", "list"):
            model = self._model_of_queue(key)
            if model is None or model in known or model in strays:
                continue
            if len(strays) < STRAYS:
                strays.add(model)
            else:
                unlisted += 1
        return KnownModels(
            known=sorted(filter(is_model_name, known)), strays=sorted(strays), unlisted=unlisted
        )

    def read(self, models: Sequence[str] | None = None) -> Depths:
        """The depths of `models` in their order, or of all that are known."""
        names, spoken = self._names, self._names.all_protocols()
        unlisted = 0
        if models is None:
            found = self.find()
            models, unlisted = sorted([*found.known, *found.strays]), found.unlisted
        wanted = list(dict.fromkeys(models))
        steps = names.priority_steps
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            for each in spoken:
                pipe.zcard(each.scheduled)
                pipe.zrange(each.scheduled, 0, LATER_PLACES - 1)
                pipe.zrange(each.leases, 0, -1)
            for model in wanted:
                queues = [names.queue(model, step) for step in steps]
                for queue in queues:
                    pipe.llen(queue)
                self._oldest(keys=queues, client=pipe)
                pipe.get(names.model(model))
                for each in spoken:
                    pipe.llen(each.dead(model))
                    pipe.zrange(each.serving(model), 0, -1, withscores=True)
            told_of = iter(replies.of_each(pipe))
        now_ms = _ms(next(told_of))
        later: Counter[str] = Counter()
        unread = 0
        holders: list[tuple[Names, str]] = []
        for each in spoken:
            total = next(told_of) or 0
            places, leases = next(told_of) or (), next(told_of) or ()
            later.update(_model_of_place(place) for place in places)
            unread += total - len(places)
            holders += [(each, incarnation.decode(errors="replace")) for incarnation in leases]
        told = {}
        for model in wanted:
            depths = [next(told_of) or 0 for _ in steps]
            sent, advert = next(told_of) or (), next(told_of)
            by_protocol = [(next(told_of) or 0, next(told_of) or ()) for _ in spoken]
            told[model] = depths, sent, advert, by_protocol
        claimed = self._claimed(holders)
        return Depths(
            models=[
                _depth(model, steps, now_ms, later[model], claimed[model], *told[model])
                for model in wanted
            ],
            later_unread=max(0, unread),
            unlisted=unlisted,
        )

    def _claimed(self, holders: Sequence[tuple[Names, str]]) -> Counter[str]:
        """Model → requests that workers hold. A settled place in a claim is blank."""
        with self._client.pipeline(transaction=False) as pipe:
            for names, incarnation in holders:
                pipe.hkeys(names.claims(incarnation))
            held = replies.of_each(pipe)
        keys = [
            (claim.model, key)
            for (names, _), claims in zip(holders, held, strict=True)
            for key in claims or ()
            if (claim := _claim(names, key)) is not None
        ]
        with self._client.pipeline(transaction=False) as pipe:
            for _, key in keys:
                pipe.llen(key)
                pipe.lpos(key, "", count=0)
            sizes = replies.of_each(pipe)
        claimed: Counter[str] = Counter()
        for (model, _), size, blank in zip(keys, sizes[::2], sizes[1::2], strict=True):
            claimed[model] += max(0, (size or 0) - len(blank or ()))
        return claimed

    def _scan(self, prefix: str, pattern: str, kind: str | None = None) -> Iterator[str]:
        match = glob_of(prefix) + pattern
        keys = self._client.scan_iter(match=match, count=_SCAN_COUNT, _type=kind)
        return (key.decode("utf-8", "replace") for key in keys)

    def _model_of_queue(self, key: str) -> str | None:
        queue = key.removeprefix(self._names.prefix)
        for step in self._names.priority_steps:
            end = f"{self._names.sep}{step}"
            if step and queue.endswith(end):
                return model_of(queue.removesuffix(end))
        return model_of(queue)


def _depth(
    model: str,
    steps: Sequence[int],
    now_ms: float,
    later: int,
    claimed: int,
    depths: Sequence[int],
    sent: Sequence[bytes],
    announced: bytes | None,
    by_protocol: Sequence[tuple[int, Sequence[tuple[bytes, float]]]],
) -> Depth:
    depth = sum(depths)
    times = list(_times(sent))
    advert = _advert(announced)
    limit = (advert.max_queue_depth if advert is not None else 0) or None
    live = {i for _, serving in by_protocol for i, lease_ends in serving if lease_ends > now_ms}
    return Depth(
        model=model,
        depth=depth,
        by_priority=dict(zip(steps, depths, strict=True)),
        oldest_age_s=max(0.0, round((now_ms - min(times)) / 1000, 3)) if times else None,
        later=later,
        claimed=claimed,
        dead=sum(count for count, _ in by_protocol),
        consumers=len(live),
        max_queue_depth=limit,
        near_limit=limit is not None and depth >= NEAR * limit,
    )


def _times(sent: Sequence[bytes]) -> Iterator[float]:
    """The values that are times: anybody who may push a message can write anything there."""
    for ms in sent:
        if ms not in {b"", _EMPTY}:
            with suppress(ValueError):
                yield float(ms)


def _claim(names: Names, key: bytes) -> ClaimName | None:
    try:
        return names.parse_claim(key.decode())
    except ValueError:
        return None


def _advert(announced: bytes | None) -> ModelAdvert | None:
    try:
        return codec.decode_advert(announced) if announced is not None else None
    except ConfigError:
        return None


def _model_of_place(place: bytes) -> str:
    return place.decode("utf-8", "replace").partition(":")[0]


def _ms(time: Any) -> float:
    seconds, micros = time
    return float(seconds) * 1000 + float(micros) / 1000
