"""How fast the links of one request are made while other threads have work to do."""

from __future__ import annotations

import time
from typing import Final

#: CPU seconds of one thread for which it makes links without a break, and seconds of a break.
#: Celery makes a message in some 0.3 ms of Python. Whoever waits for the interpreter meanwhile is
#: given it after `publisher.SWITCH_S`, and a claim waits some 30 times. With breaks as long as the
#: work, the slowest of 100 requests of other models took 1.1 to 1.2 times as long as with these.
WORK_S: Final = 0.001
BREAK_S: Final = 0.004


class Pace:
    """Has one thread sleep now and then. A request that few links follow on is made in one go."""

    def __init__(self) -> None:
        self._began = 0.0

    def begin(self) -> None:
        """What this thread does from now on is for another request."""
        self._began = time.thread_time()

    def give_way(self) -> None:
        """Sleep, if this thread has worked for `WORK_S` since it last slept."""
        if time.thread_time() - self._began > WORK_S:
            time.sleep(BREAK_S)
            self._began = time.thread_time()
