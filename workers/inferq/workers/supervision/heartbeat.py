"""A worker's heartbeat file: what it does and whether it gets on with it, written every second.

`health` says what stands in it, and judges it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from inferq.shared.errors import ConfigError
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.models.not_served import NotServed
from inferq.workers.process.periodic import Loop, Periodic, troubles
from inferq.workers.supervision import runtime_folder
from inferq.workers.supervision.health import LOADING, SERVING, STOPPING, Beat
from inferq.workers.supervision.redis_identity import RedisPlace

logger = logging.getLogger(__name__)

BEAT_S: Final = 1.0
#: Seconds without an answer from Redis, which is asked every second.
UNANSWERED_S: Final = 3.0
#: Until it serves, for which somebody may be waiting.
LOADING_BEAT_S: Final = 0.1


class Watched(Protocol):
    """What a heartbeat looks at: the data plane."""

    @property
    def answered_at(self) -> float: ...

    @property
    def answering_since(self) -> float: ...

    @property
    def models(self) -> Iterable[ServedModel]: ...

    @property
    def steps(self) -> int:
        """Grows with whatever gets done."""

    @property
    def run_id(self) -> str:
        """Of the Redis that it spoke to last."""

    def backlog(self) -> bool:
        """Whether it knows of requests that it could claim."""


class Links(Protocol):
    """What a heartbeat looks at: the canvas."""

    def waits_s(self) -> float:
        """Seconds for which the links of one request have been waiting; not for a full Redis."""


def links_s(plane: Watched, links: Links | None) -> float:
    """Seconds for which links have waited while Redis answered the data plane."""
    waited = links.waits_s() if links is not None else 0.0
    return min(waited, time.monotonic() - plane.answering_since)


class Heartbeat:
    """Writes the file from a thread of its own. `plane` and `links` are set once there are any.

    `loops` are those of the worker, running or not. `not_served` tells what the worker was to serve
    and does not.
    """

    def __init__(
        self,
        path: Path,
        node: str,
        loops: Callable[[], Iterable[Loop]],
        not_served: Callable[[], Sequence[NotServed]] = lambda: (),
    ) -> None:
        self._path = path
        self._node = node
        self._loops = loops
        self._not_served = not_served
        self._bad: dict[str, str] = {}
        self.plane: Watched | None = None
        self.links: Links | None = None
        #: Whose requests the worker serves.
        self.redis: RedisPlace | None = None
        self.stopping = False
        self._serves = False
        self._folder_is_default = False
        self._steps = 0
        self._progressed = time.monotonic()
        self._loop = Periodic(
            "heartbeat",
            self._turn,
            every_s=BEAT_S,
            max_retry_s=BEAT_S,
            failing="no heartbeat",
            logger=logger,
        )

    def start(self) -> None:
        """Write it, from now on. ConfigError if it cannot be written."""
        self._folder_is_default = runtime_folder.is_known(self._path.parent)
        try:
            self._write()
        except OSError as problem:
            raise ConfigError(
                f"INFERQ_HEARTBEAT_FILE is {str(self._path)!r}; expected a file that can be "
                f"written: {problem}"
            ) from problem
        self._loop.start()

    def stop(self) -> None:
        """The end of the worker: the file goes too."""
        self._loop.stop()
        self._path.unlink(missing_ok=True)

    def _turn(self) -> float:
        try:
            self._write()
        except ConfigError as problem:  # somebody else has the folder now
            raise PermissionError(problem.message) from None
        return BEAT_S if self._serves else LOADING_BEAT_S

    def _lasting(self, bad: dict[str, str]) -> dict[str, str]:
        """Of `bad`, what was so a beat ago too: a process that was stopped goes on at once."""
        before, self._bad = self._bad, bad
        return {name: how for name, how in bad.items() if name in before}

    def _write(self) -> None:
        folder = self._path.parent
        if self._folder_is_default:
            runtime_folder.make(folder)
        else:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = json.dumps(msgspec.to_builtins(self._beat())).encode()
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _beat(self) -> Beat:
        now, plane = time.monotonic(), self.plane
        models = list(plane.models) if plane is not None else []
        computing = sum(len(job.items) for model in models for job, _ in model.computing())
        audits = any(model.audit.since is not None for model in models)
        waiting = sum(len(model.reserved()) for model in models)
        steps = plane.steps if plane is not None else 0
        work = waiting or (plane is not None and plane.backlog())
        for_company = any(model.due_mono_ms is not None for model in models)
        # Without Redis there is nothing to get on with: health asks for how long that is so.
        silent = plane is not None and now - plane.answered_at > UNANSWERED_S
        busy = computing or audits  # what takes too long of that is overdue
        if steps != self._steps or busy or for_company or silent or not work:
            self._steps, self._progressed = steps, now
        self._serves = plane is not None and plane.answered_at > 0
        state = SERVING if self._serves else LOADING
        return Beat(
            pid=os.getpid(),
            node=self._node,
            state=STOPPING if self.stopping else state,
            written=now,
            answered=plane.answered_at if plane is not None else 0.0,
            computing=computing,
            waiting=waiting,
            overdue=any(model.overdue() for model in models),
            stuck_s=round(now - self._progressed, 3),
            not_served=self._not_served(),
            redis=self.redis,
            run_id=plane.run_id if plane is not None else "",
            links_s=0.0 if silent or plane is None else round(links_s(plane, self.links), 3),
            loops=self._lasting(troubles(self._loops())),
        )
