"""Whether a call gives the GIL away: what a busy thread would keep for milliseconds each time."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

#: Seconds; longer than any call here: nobody is made to let go of the GIL.
NEVER_FORCED_S = 60.0


def times_given_away(call: Callable[[], object], runs: int = 100) -> int:
    """In how many of so many runs of `call` another thread ran meanwhile, though nothing forced it.

    0 is certain to be found where it is so. Of what gives the GIL away some runs are missed.
    """
    turns, ended = 0, False

    def wait_for_turns() -> None:
        nonlocal turns
        while not ended:
            turns += 1
            time.sleep(1e-6)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(NEVER_FORCED_S)
    other = threading.Thread(target=wait_for_turns)
    other.start()
    found = 0
    try:
        for _ in range(runs):
            time.sleep(2e-4)
            before = turns
            call()
            found += turns != before
    finally:
        ended = True
        other.join()
        sys.setswitchinterval(usual)
    return found
