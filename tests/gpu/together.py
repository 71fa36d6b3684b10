"""Several lanes at once, each in a thread of its own. What one of them raises ends all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

#: A lane that takes longer for its first runs hangs.
READY_WITHIN_S: Final = 120.0
#: And so does one that has not ended so long after it was told to.
ENDED_WITHIN_S: Final = 60.0


class Turns:
    """What the threads of one `together` share."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)
        self._lock = threading.Lock()
        self._failed: list[BaseException] = []

    @property
    def on(self) -> bool:
        """Whether none of them has failed so far."""
        return not self._failed

    def one_by_one(self, work: Callable[[], None]) -> None:
        """`work` of each in turn; returns when all of them have done theirs."""
        with self._lock:
            work()
        self._barrier.wait(READY_WITHIN_S)

    def failed(self, problem: BaseException) -> None:
        """Let the others stop, which may be waiting for this one."""
        self._failed.append(problem)
        self._barrier.abort()

    def first(self) -> BaseException | None:
        """What the first one to fail raised; the others' is a consequence of it, or none."""
        return self._failed[0] if self._failed else None


def together(works: Sequence[Callable[[Turns], None]], seconds: float) -> None:
    """Run all `works`, which take `seconds` and their turns; raise what the first one to fail did.

    They look at `Turns.on` after each batch. TimeoutError: one of them hangs.
    """
    turns = Turns(len(works))

    def run(work: Callable[[Turns], None]) -> None:
        try:
            work(turns)
        except BaseException as problem:  # noqa: BLE001 - it is raised below
            turns.failed(problem)

    # A thread that hangs is no reason to wait for ever, nor to keep the process.
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(READY_WITHIN_S + seconds + ENDED_WITHIN_S)
    first = turns.first()
    if first is not None:
        raise first
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError("a lane did not end; expected it to after each batch")
