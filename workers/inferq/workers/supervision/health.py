"""Whether a worker consumes, judged by its heartbeat file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from inferq.workers.models.not_served import NotServed
from inferq.workers.process.own_files import read_own
from inferq.workers.supervision.redis_identity import RedisPlace

#: Exit status of a worker whose engine is beyond use; its supervisor starts a fresh one.
EX_FATAL_ENGINE: Final = 70
#: That of one that was shut down by remote control, under a supervisor (sysexits.h).
EX_SHUT_DOWN: Final = 75
#: Seconds without a heartbeat after which something is wrong.
STALE_S: Final = 10.0
#: Seconds without an answer from Redis.
UNHEARD_S: Final = 15.0
#: Seconds of work without progress while nothing computes.
STUCK_S: Final = 30.0
#: A heartbeat names what is not served, with reasons that are short.
_MAX_BYTES: Final = 4 << 20

#: What a worker's state is called.
LOADING: Final = "loading"
SERVING: Final = "serving"
STOPPING: Final = "stopping"
#: As problems are told.
OVERDUE: Final = "a batch computes for longer than max_run_seconds"
LINKS: Final = "links of a request have waited to be published for {:.0f} s, though Redis answers"
#: The one reason that may be Redis', which a worker waits for before it loads its models.
LOADS: Final = "it is loading"


class Beat(msgspec.Struct, frozen=True):
    """One JSON object. Times are s of CLOCK_MONOTONIC, which all processes of a host share."""

    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    node: str
    state: str
    written: float
    #: When Redis last answered the data plane; 0: never yet.
    answered: float
    #: Requests that compute, and that are claimed and wait.
    computing: int
    waiting: int
    #: A batch computes for longer than its model's max_run_seconds.
    overdue: bool
    #: Seconds that there was work, nothing computed and nothing else went on either.
    stuck_s: float
    #: What it was to serve and does not: it is healthy all the same.
    not_served: Sequence[NotServed] = ()
    #: Whose requests it serves; None: one of before this was told.
    redis: RedisPlace | None = None
    #: Of the Redis that it spoke to last; empty: to none yet.
    run_id: str = ""
    #: Seconds that the links of a request could not be published, though Redis answers.
    links_s: float = 0.0
    #: Background loops that have ended or hang, and how: {"recovery": "has ended"}.
    loops: dict[str, str] = {}


def forget_the_dead(folder: Path) -> None:
    """Remove the heartbeats in `folder` of workers that were killed along with their supervisor."""
    for path in folder.glob("*.json"):
        beat = read_beat(path)
        if beat is not None and not _lives(beat.pid):
            path.unlink(missing_ok=True)


def read_beat(path: Path, *, anybodys: bool = False) -> Beat | None:
    """The heartbeat at `path`; None if there is none, or it is no heartbeat.

    It is this user's or root's; `anybodys`: root may read those of others.
    """
    try:
        content = read_own(path, _MAX_BYTES, roots=True, anybodys=anybodys)
        return msgspec.json.decode(content, type=Beat)
    except (OSError, ValueError, msgspec.DecodeError, RecursionError):
        return None


def problem_of(beat: Beat) -> str | None:
    """Why this worker does not consume; None if it does, as far as it goes by itself."""
    now = time.monotonic()
    if not _lives(beat.pid):
        return f"its process {beat.pid} is gone"
    if now - beat.written > STALE_S:
        return f"no heartbeat for {now - beat.written:.0f} s"
    if beat.state != SERVING:
        return LOADS if beat.state == LOADING else f"it is {beat.state}"
    return stuck(beat)


def stuck(beat: Beat) -> str | None:
    """Why it would never get on with its work; None if it does, or has none."""
    if beat.overdue:
        return OVERDUE
    if beat.stuck_s > STUCK_S:
        return f"it has work and has made no progress for {beat.stuck_s:.0f} s"
    if beat.links_s > STUCK_S:
        return LINKS.format(beat.links_s)
    if beat.loops:
        return loops_problem(beat.loops)
    return None


def loops_problem(loops: Mapping[str, str]) -> str:
    """As problems are told, of loops as a heartbeat has them; there is at least one."""
    return "; ".join(f"its background loop {name} {how}" for name, how in sorted(loops.items()))


def silence_s(beat: Beat) -> float | None:
    """Seconds since Redis last answered it, if these are too many."""
    silent = time.monotonic() - beat.answered
    return silent if silent > UNHEARD_S else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
