"""Many clients at once, each with one request on its way."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from inferq.producer import Client
from inferq.shared.schema import Array, Receipt

CLIENTS = 16
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What one request held and what it got."""

    x: Array
    outputs: Mapping[str, Array]
    receipt: Receipt


def ask(redis_url: str, model: str, requests: int, *, clients: int = CLIENTS) -> list[Answer]:
    """`requests` different rows of three, by so many `clients`; in the order of their answers."""
    numbers = itertools.count()
    answers: list[Answer] = []
    lock = threading.Lock()

    def serve_one_client() -> None:
        with Client(redis_url) as client:
            while (n := next(numbers)) < requests:
                x = np.random.default_rng(n).uniform(-1, 10, (1, 3)).astype(np.float32)
                result = client.infer(model, {"x": x}, timeout=TIMEOUT_S)
                assert result.receipt is not None
                with lock:
                    answers.append(Answer(x, result.outputs, result.receipt))

    with ThreadPoolExecutor(clients) as pool:
        for each in [pool.submit(serve_one_client) for _ in range(clients)]:
            each.result()
    return answers
