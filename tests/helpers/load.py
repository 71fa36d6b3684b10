"""Requests without end, from a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from helpers.repository import numbered
from inferq.producer import Client
from inferq.shared.schema import Array

STOP_TIMEOUT_S = 30.0


class Load:
    """Keeps `in_flight` requests for `model` on the way, as a context manager."""

    def __init__(self, redis_url: str, model: str, in_flight: int = 256) -> None:
        self._redis_url = redis_url
        self._model = model
        self._in_flight = in_flight
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        #: Requests that were answered.
        self.done = 0
        self.problem: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(STOP_TIMEOUT_S)
        assert not self._thread.is_alive()
        if error is None and self.problem is not None:
            raise self.problem

    def _items(self) -> Iterator[dict[str, Array]]:
        while not self._ended.is_set():
            yield {"x": numbered(1)}

    def _run(self) -> None:
        try:
            with Client(self._redis_url) as client:
                for _ in client.map(self._model, self._items(), in_flight=self._in_flight):
                    self.done += 1
        except Exception as problem:  # noqa: BLE001 - told at the end
            self.problem = problem
