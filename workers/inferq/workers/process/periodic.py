"""The loop of every background thread of a worker: it logs whatever a turn raises, and goes on.

A failed turn is repeated after a while; after unexpected errors the wait grows. The same error is
logged less and less often. `problem`, which the heartbeat calls, reports a loop that has ended all
the same, or whose turn takes too long.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from redis.exceptions import RedisError

#: Seconds until a failed turn is repeated: the first time, and at most.
RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 10.0
#: Seconds that a turn may take: all its waits have timeouts of a few seconds.
STALL_S: Final = 60.0
#: Seconds until the same kind of failure is logged again: the first time, and at most.
SAY_AGAIN_S: Final = 10.0
MAX_SAY_AGAIN_S: Final = 600.0
#: Most kinds of failures that are remembered.
MAX_KINDS: Final = 32
_JOIN_S: Final = 5.0

#: What turns raise while Redis is away, is full or holds keys of the wrong type. The next turn may
#: succeed.
EXPECTED: Final = (RedisError, OSError)


class Sayings:
    """Makes the same message be logged less and less often. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Kind → when it may be logged again, the wait after that, and how often it was left out.
        self._said: dict[str, tuple[float, float, int]] = {}

    def due(self, kind: str) -> int | None:
        """None: do not log it now. Else how often it was left out since the last time."""
        now = self._clock()
        again_at, pause, unsaid = self._said.pop(kind, (-math.inf, SAY_AGAIN_S, 0))
        if now < again_at:
            self._said[kind] = again_at, pause, unsaid + 1
            return None
        if now > again_at + MAX_SAY_AGAIN_S:  # long ago: counts as the first time
            pause = SAY_AGAIN_S
        self._said[kind] = now + pause, min(2 * pause, MAX_SAY_AGAIN_S), 0
        if len(self._said) > MAX_KINDS:
            del self._said[next(iter(self._said))]
        return unsaid


class Periodic:
    """Calls `turn` again and again from a thread of its own. `name`: its name in the heartbeat.

    `turn` returns the seconds until the next one; None means `every_s`, math.inf means until
    `wake`. `wake` ends any such wait. The first turn comes at once, or after `first_s`. A turn may
    take `stall_s` (math.inf: it may wait for ever). A failed turn is repeated after `retry_s`,
    later after at most `max_retry_s`, and its log line begins with `failing`. `ending` is called in
    the thread after the last turn.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[], float | None],
        *,
        every_s: float,
        failing: str,
        logger: logging.Logger,
        first_s: float = 0.0,
        retry_s: float = RETRY_S,
        max_retry_s: float = MAX_RETRY_S,
        stall_s: float = STALL_S,
        ending: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self._turn = turn
        self._every_s = every_s
        self._failing = failing
        self._logger = logger
        self._first_s = first_s
        self._retry_s = retry_s
        self._max_retry_s = max(retry_s, max_retry_s)
        self._stall_s = stall_s
        self._ending = ending
        self._sayings = Sayings()
        self._failures = 0
        self._wake = threading.Event()
        self._stopping = threading.Event()
        #: When the present turn began (monotonic s); None: no turn runs.
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"inferq-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread. Call it once."""
        self._thread.start()

    def wake(self) -> None:
        """Begin the next turn now. For any thread."""
        if not self._wake.is_set():
            self._wake.set()

    def stop(self, timeout: float = _JOIN_S) -> bool:
        """End after the present turn; wait at most `timeout` s. True once it has ended.

        Idempotent.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called; for turns that take long."""
        return self._stopping.is_set()

    def pause(self, seconds: float) -> None:
        """Wait within a turn; `stop` cuts it short, `wake` does not."""
        self._stopping.wait(seconds)

    def problem(self) -> str | None:
        """Why the loop does not work; None if it does, has not started, or was stopped."""
        began = self._began
        if self._stopping.is_set() or self._thread.ident is None:
            return None
        if not self._thread.is_alive():
            return "has ended"
        if began is not None and time.monotonic() - began > self._stall_s:
            return f"has not got on for {time.monotonic() - began:.0f} s"
        return None

    def _run(self) -> None:
        pause_s = self._first_s
        while not self._stopping.is_set():
            self._wake.wait(None if pause_s == math.inf else pause_s)
            self._wake.clear()
            if self._stopping.is_set():
                break
            pause_s = self._take_turn()
        if self._ending is not None:
            try:
                self._ending()
            except Exception as problem:  # noqa: BLE001 - told
                self._tell(problem)

    def _take_turn(self) -> float:
        """Seconds until the next one."""
        self._began = time.monotonic()
        try:
            pause_s = self._turn()
        except Exception as problem:  # noqa: BLE001 - told
            self._tell(problem)
            return self._back_off(problem)
        else:
            self._failures = 0
            return self._every_s if pause_s is None else max(0.0, pause_s)
        finally:
            self._began = None

    def _back_off(self, problem: Exception) -> float:
        if isinstance(problem, EXPECTED):
            return self._retry_s
        self._failures += 1
        return min(self._max_retry_s, self._retry_s * 2.0 ** min(self._failures - 1, 10))

    def _tell(self, problem: Exception) -> None:
        try:
            unsaid = self._sayings.due(type(problem).__name__)
            if unsaid is None:
                return
            level, trace = logging.WARNING, None
            if not isinstance(problem, EXPECTED):
                level, trace = logging.ERROR, problem
            more = f" (and {unsaid} more like it before)" if unsaid else ""
            said = f"{problem}" or repr(problem)
            self._logger.log(level, f"{self._failing}: %s%s", said, more, exc_info=trace)
        except Exception:  # noqa: BLE001 - a failing log must not end the loop
            return


class Loop(Protocol):
    """A loop that can be asked whether it works."""

    @property
    def name(self) -> str: ...

    def problem(self) -> str | None: ...


def troubles(loops: Iterable[Loop]) -> dict[str, str]:
    """The names of `loops` that do not work, and why."""
    found = {loop.name: loop.problem() for loop in loops}
    return {name: problem for name, problem in found.items() if problem is not None}
