"""Redis goes back behind a claim that is settled in part, and behind more than any worker keeps.

The requests of one claim are computed one after another for seconds. Beside it thousands of quick
ones are settled. All are pushed before the point that Redis goes back to, so each must have its
result in the end. They are pushed as a stock application would: nobody pushes them again.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable

import numpy as np
from helpers.repository import message

from chaos.content import LONG, LONG_ROWS, QUICK, SUCCESS, WIDTH, Request
from chaos.schedule import BURST_S, PRODUCERS, WORKERS
from chaos.store import Mark, Store
from inferq.shared.names import META_PREFIX, Names
from inferq.workers.claims.rollback import KEEP_REQUESTS

#: Quick requests of one burst: each worker settles more than it keeps, while its claim computes.
MANY = round(2.0 * WORKERS * KEEP_REQUESTS)
#: Claims of the slow model, and requests in each.
CLAIMS, CLAIM = 2 * WORKERS, 4
#: Seconds that the other workers have to claim these: less than the first request of one computes.
CLAIM_S = 0.3
#: Seconds after which most of a claim has ended.
REST_S = 4.0
POLL_S = 0.01
_RESULT = re.compile(rb"\r\nSET\r\n\$\d+\r\n" + META_PREFIX.encode() + rb"([^\r]+)\r\n")


class Beside:
    """All that the bursts of a run have asked, beside what its producers do."""

    def __init__(self, store: Store, seed: int) -> None:
        self._store = store
        self._rng = random.Random(f"burst:{seed}")
        self._names = Names()
        #: What was asked, by id.
        self.asked: dict[str, Request] = {}
        #: Of each burst: how many results were stored that Redis then forgot, and how many of these
        #: were of claims that were settled in part.
        self.forgotten: list[tuple[int, int]] = []

    def burst(self, over: threading.Event) -> Mark:
        """Ask, wait until most is settled, and say what Redis is to go back to."""
        messages = self._messages()
        start = self._store.aof_bytes()
        began = time.monotonic()
        with self._store.client("producer") as client:
            quick, long = (self._names.queue(model) for model in (QUICK, LONG))
            with client.pipeline(transaction=True) as pipe:
                for model, asked in messages.items():
                    pipe.lpush(self._names.queue(model), *asked)
                pipe.execute()
            bound = began + BURST_S - REST_S
            self._wait(over, bound, lambda: client.llen(long) < CLAIMS * CLAIM)
            left = (CLAIMS - WORKERS) * CLAIM
            self._wait(over, time.monotonic() + CLAIM_S, lambda: client.llen(long) <= left)
            mark = self._store.aof_bytes()
            self._wait(over, bound, lambda: client.llen(quick) == 0)
        over.wait(self._rng.choice((0.2, REST_S)))
        forgotten = self._stored(mark) - self._stored(start, mark)
        of_claims = sum(self.asked[request_id].model == LONG for request_id in forgotten)
        self.forgotten.append((len(forgotten), of_claims))
        return Mark(mark, began)

    def _stored(self, start: int, end: int | None = None) -> set[str]:
        """The ids of requests of bursts whose results stand in that part of the AOF."""
        found = {key.decode() for key in _RESULT.findall(self._store.read_aof(start, end))}
        return found & self.asked.keys()

    def _messages(self) -> dict[str, list[bytes]]:
        """By model, in the order in which they are pushed."""
        quick = [self._message(QUICK, 1, WIDTH) for _ in range(MANY)]
        # Their widths keep those of a claim from being computed together, and the first is short.
        long = [
            self._message(LONG, LONG_ROWS if place else 1, WIDTH + place)
            for _ in range(CLAIMS)
            for place in range(CLAIM)
        ]
        return {QUICK: quick, LONG: long}

    def _message(self, model: str, rows: int, width: int) -> bytes:
        x = np.full((rows, width), 1.0 + self._rng.random())
        x[0, 1:3] = PRODUCERS, len(self.asked)
        request_id, raw = message(model, x)
        self.asked[request_id] = Request(model, 0, x, SUCCESS)
        return raw

    def _wait(self, over: threading.Event, until_s: float, reached: Callable[[], bool]) -> None:
        while not reached() and time.monotonic() < until_s and not over.is_set():
            over.wait(POLL_S)
