"""On a worker's PYTHONPATH: its wall clock is off by INFERQ_TEST_CLOCK_S seconds."""

import os
import time

_right = time.time
_off = float(os.environ["INFERQ_TEST_CLOCK_S"])
time.time = lambda: _right() + _off
