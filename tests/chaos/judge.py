"""What was lost, changed or wrong; how long recoveries took; what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import redis

from chaos.content import SUCCESS, Request
from chaos.ledger import Accepted, Ledger, Resolved
from chaos.producer import UNREAD, digest_of, outcome_of
from chaos.record import POISONED, Record
from chaos.schedule import Kind
from chaos.store import Restart
from inferq.producer.pending import Result
from inferq.shared.codec import MalformedMessage, decode_envelope, decode_meta, decode_outputs
from inferq.shared.errors import from_wire
from inferq.shared.names import Names

#: Recoveries of these are timed.
TIMED = frozenset({Kind.SIGKILL.value, Kind.SIGSTOP.value, POISONED})
#: Seconds that Redis may go back, and that a worker needs to store its newest results again.
ROLLBACK_S = 2.5
REAPPLY_S = 3.0
_TERMINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
_AT_ONCE = 500


@dataclass(frozen=True)
class End:
    """What Redis has stored of a request when everything is over."""

    digest: str
    #: As Resolved.outcome; empty if nothing terminal is stored.
    outcome: str


@dataclass
class Verdict:
    """Ids, each with what is the matter."""

    lost: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    #: Told to their producer, then rolled back by Redis when the worker that could have stored
    #: them again was gone as well, or together with the request itself and further than workers
    #: keep. That is no promise broken.
    gone: dict[str, str] = field(default_factory=dict)


def judge(
    ledger: Ledger,
    ends: Mapping[str, End],
    expected: Callable[[Accepted], str],
    restarts: Sequence[Restart],
    away: Sequence[tuple[float, str]],
) -> Verdict:
    """Hold every accepted request against what was expected and what is stored.

    `away`: see Record.
    """
    verdict = Verdict()
    for request_id, accepted in ledger.accepted.items():
        resolved = ledger.resolved.get(request_id)
        end = ends[request_id]
        if resolved is None:
            verdict.lost[request_id] = f"no outcome at its producer; stored: {end.outcome or '-'}"
            continue
        wanted = expected(accepted)
        if resolved.outcome != wanted:
            verdict.wrong[request_id] = f"{resolved.outcome}; expected {wanted}"
        if not end.outcome:
            lost_twice = _rolled_back_with_its_worker(resolved, restarts, away)
            whole = any(_rolled_back_whole(accepted, resolved, one) for one in restarts)
            matters = verdict.gone if lost_twice or whole else verdict.changed
            matters[request_id] = f"was {resolved.outcome}; nothing is stored now"
        elif end.outcome != resolved.outcome:
            verdict.changed[request_id] = f"was {resolved.outcome}, is {end.outcome}"
        elif resolved.digest not in (end.digest, UNREAD) and not any(
            _before(resolved, restart) for restart in restarts
        ):
            verdict.changed[request_id] = "the stored bytes differ within one history of Redis"
    return verdict


def _before(resolved: Resolved, restart: Restart) -> bool:
    """Whether Redis may have gone back behind this result: a last reply outlives its sender."""
    return restart.rolled_back and resolved.at < restart.back_at


def _rolled_back_whole(accepted: Accepted, resolved: Resolved, restart: Restart) -> bool:
    """Whether Redis may have gone back behind its very push, and further than workers keep."""
    far = restart.back_to is not None and accepted.at >= restart.back_to
    return far and _before(resolved, restart)


def judge_beside(asked: Mapping[str, Request], ends: Mapping[str, End], verdict: Verdict) -> None:
    """Hold what bursts asked for against what is stored; see burst.py."""
    for request_id, request in asked.items():
        outcome = ends[request_id].outcome
        if not outcome:
            verdict.lost[request_id] = f"asked of {request.model} in a burst; nothing is stored"
        elif outcome != request.expected:
            verdict.wrong[request_id] = f"{outcome}; expected {request.expected} of a burst"


def _rolled_back_with_its_worker(
    resolved: Resolved, restarts: Sequence[Restart], away: Sequence[tuple[float, str]]
) -> bool:
    for restart in restarts:
        if _before(resolved, restart) and restart.killed_at - resolved.at < ROLLBACK_S:
            return any(
                resolved.at - 1.0 <= at <= restart.back_at + REAPPLY_S
                and resolved.worker in ("", worker)
                for at, worker in away
            )
    return False


def read_ends(store: redis.Redis, asked: Mapping[str, Request]) -> dict[str, End]:
    """What is stored of every request that was asked, by id."""
    names, ends = Names(), {}
    ids = list(asked)
    for start in range(0, len(ids), _AT_ONCE):
        block = ids[start : start + _AT_ONCE]
        found: Any = store.mget([names.meta(one) for one in block])
        for request_id, raw in zip(block, found, strict=True):
            outcome = _outcome(raw, asked[request_id]) if raw else ""
            ends[request_id] = End(digest_of(raw), outcome)
    return ends


def _outcome(raw: bytes, asked: Request) -> str:
    meta = decode_meta(raw)
    if meta["status"] not in _TERMINAL:
        return ""
    if meta["status"] != SUCCESS:
        return type(from_wire(meta["status"], meta.get("result"))).__name__
    return outcome_of(Result(decode_outputs(meta["result"]), None, "", 0.0), asked)


def whereabouts(store: redis.Redis, ids: Container[str]) -> dict[str, str]:
    """The lists in Redis that hold messages of `ids`."""
    found: dict[str, str] = {}
    for key in store.scan_iter("inferq*", count=1000, _type="list"):
        messages: Any = store.lrange(key, 0, -1)
        for message in messages:
            with suppress(MalformedMessage):
                request_id = decode_envelope(message).headers.id
                if request_id in ids:
                    found[request_id] = f"{found.get(request_id, '')} {key.decode()}".strip()
    return found


@dataclass(frozen=True)
class Recovery:
    """One request that was held by a worker when that was hit, until it was resolved."""

    request_id: str
    seconds: float
    what: str
    worker: str
    hit_at: float


def recoveries(ledger: Ledger, record: Record, restarts: Sequence[Restart]) -> list[Recovery]:
    """Counted from the last fault that hit a request, its producer, or Redis (its return).

    And not before there was a worker to recover it which then stayed until it was resolved: the
    schedule leaves one alone, but a worker that a request ends is not on the schedule.
    """
    found: dict[str, Recovery] = {}
    timed: set[str] = set()
    for hit in sorted(record.hits, key=lambda hit: hit.at):
        for request_id in hit.ids:
            resolved = ledger.resolved.get(request_id)
            if resolved is None or resolved.at <= hit.at:
                continue
            if hit.what in TIMED:
                timed.add(request_id)
            backs = [restart.back_at for restart in restarts if restart.back_at < resolved.at]
            producer = ledger.accepted[request_id].producer
            deaf = [at for at, who in record.deaf if who == producer and at < resolved.at]
            served = record.serving_since(resolved.at).values()
            since = max([hit.at, *backs, *deaf, min(served, default=hit.at)])
            found[request_id] = Recovery(
                request_id, resolved.at - since, hit.what, hit.worker, hit.at
            )
    return [recovery for recovery in found.values() if recovery.request_id in timed]


#: What may stand in Redis when all workers are gone: results, announcements, dead letters, and the
#: figures of one that was killed as it published them, which expire.
_MAY_STAY = ("model:", "serving:", "attempts:", "dead:", "quarantined:", "payload:", "stats:")


def leftovers(store: redis.Redis) -> list[str]:
    """Keys that should be gone once every request is settled and every worker has stopped."""
    names = Names()
    stay = tuple(names.root + kept for kept in _MAY_STAY)
    found = [key.decode() for key in store.scan_iter("inferq*", count=1000)]
    return sorted(key for key in found if not key.startswith(stay))
