"""The stock Celery that inferq is measured against, tuned as its users would tune it.

The tasks echo the same tensors that inferq's `fake` engine echoes, sent as raw bytes with dtype and
shape in msgpack: no pickle, no JSON lists, nothing that a careful user would not have removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from celery import Celery

from inferq.shared.schema import Array

#: Environment variables of the worker processes: where Redis is, and celery-batches' batch size.
URL_VARIABLE = "BENCH_REDIS_URL"
SIZE_VARIABLE = "BENCH_FLUSH_EVERY"
#: Name of the task in `plain_celery` and in `celery_batches_app`.
ECHO_TASK = "bench.echo"
TIMEOUT_S = 60.0
POLL_S = 0.05
Wire = Mapping[str, Any]


def make_app(name: str, url: str) -> Celery:
    """A Celery app on the Redis at `url`: msgpack, no events, short-lived results."""
    app = Celery(name, broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_serializer="msgpack",
        result_serializer="msgpack",
        accept_content=["msgpack"],
        result_expires=120,
        worker_send_task_events=False,
        # Celery's default prefetch stays: 4, 16, 64 and no limit measured alike, 1 a little slower.
        broker_connection_retry_on_startup=True,
    )
    return app


def to_wire(array: Array) -> dict[str, Any]:
    """A tensor as Celery's msgpack serialiser takes it."""
    return {"dtype": array.dtype.str, "shape": array.shape, "data": array.tobytes()}


def from_wire(tensor: Wire) -> Array:
    """The tensor that `to_wire` wrote."""
    return np.frombuffer(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])


def echo(tensor: Wire) -> dict[str, Any]:
    """The task's work: decode the request to an array, encode it as the answer."""
    return to_wire(from_wire(tensor))


def _check(tensor: Wire, sent: Array) -> None:
    if from_wire(tensor).shape != sent.shape:
        raise ValueError(f"answer of shape {tensor['shape']}; expected {sent.shape}")


class StockClient:
    """Sends echo requests to one queue and reads the answers as the Celery documentation does."""

    def __init__(self, url: str, queue: str) -> None:
        self._app = make_app("benchmarks.client", url)
        self._queue = queue

    def one(self, array: Array) -> Array:
        """One request, there and back."""
        answer = self._app.send_task(ECHO_TASK, (to_wire(array),), queue=self._queue)
        return from_wire(answer.get(timeout=TIMEOUT_S))

    def run_get(self, array: Array, count: int) -> None:
        """Send `count` requests, then read every answer with `AsyncResult.get`."""
        answers = self._push(array, count)
        for answer in answers:
            _check(answer.get(timeout=TIMEOUT_S), array)

    def run_get_many(self, array: Array, count: int) -> None:
        """Send `count` requests, then read all answers with the backend's `get_many` (MGET).

        Few programs do so, but nothing in stock Celery reads many answers with less CPU.
        """
        ids = [answer.id for answer in self._push(array, count)]
        read = 0
        for _, meta in self._app.backend.get_many(ids, timeout=TIMEOUT_S, interval=POLL_S):
            _check(meta["result"], array)
            read += 1
        if read != count:
            raise ValueError(f"{self._queue} answered {read} requests; expected {count}")

    def _push(self, array: Array, count: int) -> list[Any]:
        return [
            self._app.send_task(ECHO_TASK, (to_wire(array),), queue=self._queue)
            for _ in range(count)
        ]

    def close(self) -> None:
        """Close the connections."""
        self._app.close()
