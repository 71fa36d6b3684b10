"""What fails when: drawn up front, from a seed alone.

A worker's death is promised to be recovered within 15 s, by another worker. So the schedule leaves
one, the guardian, undisturbed from each such fault until what it held must have been taken over;
and Redis is left alone for `REDIS_APART_S` after each restart, since a worker recovers others only
after its own connection was up for one lease.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field
from enum import StrEnum

WORKERS = 3
PRODUCERS = 2
LEASE_S = 10.0
#: Seconds from one restart of Redis to the next.
REDIS_APART_S = 36.0
#: Seconds that the guardian is left alone: the lease, a second's scan, and some to compute.
GUARD_S = 13.0
#: Seconds that a worker may need until it serves.
START_S = 5.0
#: Seconds before the first fault.
LEAD_S = 3.0
#: Longest that a burst takes before Redis is killed, in seconds (see burst.py).
BURST_S = 12.0
#: Seconds of faults per request of the whole run: 100,000 requests in 24 minutes.
S_PER_REQUEST = 0.0144


class Kind(StrEnum):
    SIGKILL = "sigkill"
    SIGSTOP = "sigstop past the lease"
    SIGTERM = "sigterm"
    RESTART = "redis restart"
    TAIL_CUT = "redis restart, tail cut"
    CUT_AGAIN = "redis restart, tail cut, connections cut while it is told again"
    FAR_BACK = "redis restart, back behind a claim settled in part and what is kept"
    CUT = "connections cut"
    DELAY = "traffic delayed"
    HOLE = "black hole"


@dataclass(frozen=True)
class Fault:
    """One fault. `targets` are names like ``w0`` and ``p1``; none for Redis itself.

    `length_s`: how long the worker stays away or stopped, Redis is down, or traffic suffers.
    """

    at_s: float
    kind: Kind
    targets: tuple[str, ...]
    length_s: float
    #: SIGSTOP: whether SIGKILL follows, and not SIGCONT. HOLE: never ends for those connections.
    for_good: bool = False
    #: DELAY: seconds by which each piece of traffic comes later.
    delay_s: float = 0.0
    #: ON_REDIS: appendfsync from the moment that Redis is back.
    fsync: str = ""


@dataclass(frozen=True)
class Quotas:
    """How many faults of each kind a run has at least, and how long it takes in seconds."""

    counts: dict[Kind, int]
    duration_s: float

    @classmethod
    def scaled(cls, requests: int) -> Quotas:
        """Those of a run of so many requests."""
        counts = {kind: max(1, math.ceil(n * requests / 100_000)) for kind, n in FULL.items()}
        restarts = sum(counts[kind] for kind in ON_REDIS)
        return cls(counts, max(requests * S_PER_REQUEST, restarts * (REDIS_APART_S + 2)))


#: Of 100,000 requests.
FULL = {
    Kind.SIGKILL: 104,
    Kind.SIGSTOP: 22,
    Kind.SIGTERM: 10,
    Kind.RESTART: 16,
    Kind.TAIL_CUT: 7,
    Kind.CUT_AGAIN: 6,
    Kind.FAR_BACK: 6,
    Kind.CUT: 24,
    Kind.DELAY: 12,
    Kind.HOLE: 12,
}
#: Faults at which Redis goes back in time.
ON_TAIL = (Kind.TAIL_CUT, Kind.CUT_AGAIN, Kind.FAR_BACK)
ON_REDIS = (Kind.RESTART, *ON_TAIL)
ON_NETWORK = (Kind.CUT, Kind.DELAY, Kind.HOLE)


def generate(quotas: Quotas, seed: int) -> list[Fault]:
    """The faults of one run, by time. The same seed gives the same ones."""
    rng = random.Random(f"schedule:{seed}")
    drawn: list[tuple[float, int, Kind]] = []
    for kind, count in quotas.counts.items():
        if kind not in ON_REDIS:
            drawn += [
                (LEAD_S + (n + rng.random()) * quotas.duration_s / count, rng.getrandbits(40), kind)
                for n in range(count)
            ]
    restarts = [kind for kind in ON_REDIS for _ in range(quotas.counts[kind])]
    rng.shuffle(restarts)
    slot = max(quotas.duration_s / max(1, len(restarts)), REDIS_APART_S + 2)
    for n, kind in enumerate(restarts):
        at_s = LEAD_S + 1 + n * slot + rng.random() * (slot - REDIS_APART_S)
        drawn.append((at_s, rng.getrandbits(40), kind))
    return _Planner(rng, drawn).plan()


@dataclass
class _Worker:
    name: str
    #: When it serves, undisturbed by what is planned so far.
    up_s: float = 0.0
    #: Until then it is somebody's guardian.
    guards_s: float = 0.0
    faults: int = 0


@dataclass
class _Planner:
    """Gives each drawn fault a target; one that none may be done to yet is put off."""

    rng: random.Random
    drawn: list[tuple[float, int, Kind]]
    crew: list[_Worker] = field(default_factory=lambda: [_Worker(f"w{n}") for n in range(WORKERS)])
    fsync: str = "everysec"
    planned: list[Fault] = field(default_factory=list)

    def plan(self) -> list[Fault]:
        heapq.heapify(self.drawn)
        cuts_left = [kind for _, _, kind in sorted(self.drawn) if kind in ON_REDIS]
        while self.drawn:
            at_s, tie, kind = heapq.heappop(self.drawn)
            if kind in ON_REDIS:
                cuts_left.pop(0)
                self._restart(at_s, kind, cuts_left[0] if cuts_left else None)
            elif kind in (Kind.CUT, Kind.DELAY):
                self._disturb(at_s, kind)
            elif not self._hit(at_s, kind):
                heapq.heappush(self.drawn, (at_s + 0.25, tie, kind))
        return sorted(self.planned, key=lambda fault: fault.at_s)

    def _guardian(self, at_s: float, victim: _Worker | None) -> _Worker | None:
        able = [one for one in self.crew if one is not victim and one.up_s <= at_s]
        # Who guards already goes on, unless it has had fewer faults than its share.
        return max(able, key=lambda one: (one.faults, one.guards_s), default=None)

    def _restart(self, at_s: float, kind: Kind, following: Kind | None) -> None:
        down_s = self.rng.uniform(0.2, 4.0)
        # A tail can only be lost where it was not written through.
        fsync = "everysec" if following in ON_TAIL else self.rng.choice(_FSYNC)
        self.planned.append(Fault(at_s, kind, (), down_s, fsync=fsync))
        back_s = at_s + down_s + (BURST_S if kind is Kind.FAR_BACK else 0.0)
        guardian = self._guardian(at_s, None)
        if guardian is not None:
            guardian.guards_s = max(guardian.guards_s, back_s + GUARD_S + 2.0)

    def _disturb(self, at_s: float, kind: Kind) -> None:
        names = [f"w{n}" for n in range(WORKERS)], [f"p{n}" for n in range(PRODUCERS)]
        targets = self.rng.choice([*names, names[0] + names[1], self.rng.sample(names[0], 1)])
        if kind is Kind.CUT:
            self.planned.append(Fault(at_s, kind, tuple(targets), 0.0))
            return
        delay_s, length_s = self.rng.uniform(0.05, 0.5), self.rng.uniform(1.0, 4.0)
        self.planned.append(Fault(at_s, kind, tuple(targets), length_s, delay_s=delay_s))

    def _hit(self, at_s: float, kind: Kind) -> bool:
        """Plan a fault on a worker (a black hole: or on a producer); False if it must wait."""
        if kind is Kind.HOLE and self.rng.random() < 0.4:
            producer = f"p{self.rng.randrange(PRODUCERS)}"
            self.planned.append(self._fault(at_s, kind, producer))
            return True
        free = [one for one in self.crew if one.up_s + 1.0 <= at_s and one.guards_s <= at_s]
        self.rng.shuffle(free)
        for victim in sorted(free, key=lambda one: one.faults):
            guardian = self._guardian(at_s, victim)
            if guardian is None:
                continue
            fault = self._fault(at_s, kind, victim.name)
            self.planned.append(fault)
            victim.faults += 1
            victim.up_s = at_s + _away_s(fault)
            guardian.guards_s = max(guardian.guards_s, at_s + GUARD_S)
            return True
        return False

    def _fault(self, at_s: float, kind: Kind, target: str) -> Fault:
        rng = self.rng
        match kind:
            case Kind.SIGKILL:
                return Fault(at_s, kind, (target,), rng.uniform(0.05, 1.0))
            case Kind.SIGSTOP:
                length_s = rng.uniform(LEASE_S + 2.0, LEASE_S + 4.0)
                return Fault(at_s, kind, (target,), length_s, for_good=rng.random() < 0.3)
            case Kind.HOLE:
                length_s = rng.uniform(1.0, 12.0)
                return Fault(at_s, kind, (target,), length_s, for_good=rng.random() < 0.3)
            case _:
                return Fault(at_s, kind, (target,), rng.uniform(0.05, 1.0))


_FSYNC = ("always", "everysec")


def _away_s(fault: Fault) -> float:
    """Seconds until a worker serves again after `fault`, with every connection replaced."""
    match fault.kind:
        case Kind.SIGSTOP:
            return fault.length_s + (START_S + 1.0 if fault.for_good else 1.0)
        case Kind.HOLE:
            return 6.0  # five until its waits for replies end
        case Kind.SIGTERM:
            return fault.length_s + START_S + 3.0
        case _:
            return fault.length_s + START_S
