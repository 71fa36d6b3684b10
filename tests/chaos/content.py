"""What is asked and what the answer must be: a function of seed, producer and number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from inferq.producer.outgoing import INLINE_LIMIT
from inferq.shared.schema import Array
from inferq.workers.engines.fake import FAULT_EXIT, FAULT_RAISE

#: Model → ms a batch, ms a row, most rows, and how many of a hundred requests are for it. One
#: worker is just about able to serve what a run asks for: else the least urgent would starve.
MODELS = {"fast": (1.0, 0.0, 8, 10), "brisk": (10.0, 0.0, 4, 15), "slow": (40.0, 4.0, 4, 75)}
#: What bursts ask for (see burst.py), in the same way.
QUICK, LONG = "quick", "long"
LONG_ROWS = 4
BESIDE = {QUICK: (0.0, 0.0, 64, 0), LONG: (0.0, 400.0, LONG_ROWS, 0)}
WIDTH = 4
#: One request in so many makes the engine raise.
RAISE_EVERY = 500
#: One request in so many of the first producer's ends the worker's process.
EXIT_EVERY = 5_000
#: The first of them has about this number.
EXIT_FIRST = 300
#: One request in so many is large enough to be claim-checked.
LARGE_EVERY = 150
#: kombu's step → how many of a hundred requests have it.
PRIORITIES = {0: 60, 3: 20, 6: 12, 9: 8}

SUCCESS = "SUCCESS"

TOML = """\
engine = "fake"
lanes = 1
max_batch_size = {rows}
warm_up = false
[fake]
inputs = [{{ name = "x", dtype = "float64", shape = ["batch", "width"] }}]
delay_ms = {delay_ms}
delay_ms_per_row = {per_row_ms}
faults = true
"""


@dataclass(frozen=True)
class Request:
    """One request. Its first row begins: fault or noise, producer, number."""

    model: str
    priority: int
    x: Array
    #: SUCCESS (the outputs are the inputs), or the name of the error's class.
    expected: str


def request(seed: int, producer: int, number: int) -> Request:
    """The request of this number."""
    rng = random.Random(f"{seed}:{producer}:{number}")
    model = rng.choices(list(MODELS), [share for *_, share in MODELS.values()])[0]
    priority = rng.choices(list(PRIORITIES), list(PRIORITIES.values()))[0]
    rows = rng.choice((1, 1, 1, 2))
    width = WIDTH
    if rng.randrange(LARGE_EVERY) == 0:
        width = INLINE_LIMIT // 8 + rng.randrange(4_000)
    first, expected = 1.0 + rng.random(), SUCCESS
    if rng.randrange(RAISE_EVERY) == 0:
        first, expected = float(FAULT_RAISE), "EngineError"
    if is_exit(producer, number):
        first, expected = float(FAULT_EXIT), "DeadLettered"
    x = np.full((rows, width), rng.random())
    x[0, :3] = first, producer, number
    return Request(model, priority, x, expected)


def is_exit(producer: int, number: int) -> bool:
    """Whether this request ends the process that computes it."""
    return producer == 0 and number % EXIT_EVERY == EXIT_FIRST


def number_of(x: Array) -> tuple[int, int]:
    """Producer and number of the request whose input is `x`."""
    return int(x[0, 1]), int(x[0, 2])
