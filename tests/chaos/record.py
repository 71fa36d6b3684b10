"""What was done in a run, and whom it hit: noted by all threads, each append being atomic."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from chaos.schedule import Fault
from chaos.store import Restart

#: Counted among the faults: a worker that a request ended.
POISONED: Final = "ended by a request"


@dataclass(frozen=True)
class Hit:
    """A fault that hit requests, at `at` (monotonic seconds)."""

    at: float
    #: A Kind's value, or POISONED.
    what: str
    worker: str
    ids: frozenset[str]


@dataclass
class Record:
    """Times are monotonic seconds, which all processes share."""

    hits: list[Hit] = field(default_factory=list)
    #: (when, which producer) heard less than it should, for the network's sake.
    deaf: list[tuple[float, int]] = field(default_factory=list)
    #: (when, which worker) ended, or could not reach Redis for seconds.
    away: list[tuple[float, str]] = field(default_factory=list)
    #: (when, which worker) began to serve, or reached Redis again.
    up: list[tuple[float, str]] = field(default_factory=list)
    done: list[tuple[float, Fault]] = field(default_factory=list)
    #: What must not happen: a worker that does not start, or does not end.
    troubles: list[str] = field(default_factory=list)

    def serving_since(self, at: float) -> dict[str, float]:
        """The workers that served at that instant, and since when without interruption."""
        up = {worker: began for began, worker in sorted(self.up) if began <= at}
        away = {worker: left for left, worker in sorted(self.away) if left <= at}
        return {worker: began for worker, began in up.items() if began > away.get(worker, 0.0)}

    def dump(self, began: float, restarts: list[Restart]) -> str:
        """All of it as JSON, for whoever has to find out what went wrong.

        `began`: monotonic seconds; ``wall`` is how the logs of the workers tell the time.
        """
        lines: list[tuple[float, str, object]] = [
            *[(at, f"done: {fault.kind}", fault.targets) for at, fault in self.done],
            *[(hit.at, f"hit: {hit.what} {hit.worker}", sorted(hit.ids)) for hit in self.hits],
            *[(one.killed_at, "Redis killed", one.cut) for one in restarts],
            *[(one.back_at, "Redis back", None) for one in restarts],
        ]
        wall = time.time() - time.monotonic()
        shown = [
            {
                "at_s": round(at - began, 3),
                "monotonic": round(at, 3),
                "wall": datetime.fromtimestamp(wall + at).isoformat(),
                "what": what,
                "of": of,
            }
            for at, what, of in sorted(lines, key=lambda line: line[0])
        ]
        return json.dumps(shown, indent=1)
