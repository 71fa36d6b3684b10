"""Reads all results of a sync client, in one thread on one connection.

Whatever breaks, no result is missed. On every new connection the thread subscribes, waits for the
confirmation, and then reads the results of everything unresolved. It also reads them every
`SWEEP_S`. If Redis was restarted, it may have lost the newest pushes: what is still unresolved is
pushed again with the same ids.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import redis

from inferq.producer.core import CLOSED, MAX_BACKOFF_S, SWEEP_S, Core
from inferq.producer.dialogue import ask_about_models, carry, greet, read, resume, sweep
from inferq.producer.wire import Wire
from inferq.shared.errors import InferqError
from inferq.shared.resp import BROKEN

_log: Final = logging.getLogger(__name__)
#: Seconds that `stop` waits for the thread.
_STOP_S: Final = 2.0


class Listener:
    """Start it once; stop it once."""

    def __init__(self, core: Core, client: redis.Redis) -> None:
        self._core = core
        self._client = client
        self._stopped = threading.Event()
        self._settled: list[str] = []
        self._wire: Wire | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="inferq-results", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and every wait for a result, since nobody reads results any more.

        Idempotent; does nothing in a forked child, which has no such thread.
        """
        if os.getpid() != self._pid:
            return
        self._stopped.set()
        self._core.end(CLOSED)
        wire = self._wire
        if wire is not None:
            wire.interrupt()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            self._keep_reading()
        finally:  # whatever ends it: nobody may wait for a result that nobody reads
            if not self._stopped.is_set():
                _log.critical("the thread that reads results ends: the client is closed")
            self._core.end("the thread that reads results has ended; the request goes on")

    def _keep_reading(self) -> None:
        backoff = 0.0
        while not self._stopped.wait(backoff * random.uniform(0.5, 1.0)):
            wire: Wire | None = None
            try:
                wire = Wire(self._client, self._on_push)
                wire.open()
                self._wire = wire
                wire.send([("SUBSCRIBE", self._core.channel)])
                # The confirmation is a push. It comes before the replies to the next commands.
                carry(greet(self._core), wire.call)
                carry(resume(self._core), wire.call)
                backoff = 0.0
                self._serve(wire)
            except (*BROKEN, InferqError) as problem:
                if not self._stopped.is_set():
                    _log.warning("connection for results lost, reconnecting: %s", problem)
            except Exception:  # noqa: BLE001  or all callers would wait
                _log.exception("connection for results failed, reconnecting")
            finally:
                self._wire = None
                if wire is not None:
                    wire.close()
            backoff = min(MAX_BACKOFF_S, backoff * 2 or 0.05)

    def _serve(self, wire: Wire) -> None:
        sweep_at = time.monotonic() + SWEEP_S
        while not self._stopped.is_set():
            if not self._settled:
                wire.listen(sweep_at - time.monotonic())
            patience = self._core.patience_s(len(self._settled)) if self._settled else 0.0
            if patience:
                time.sleep(patience)
                wire.listen(0.0)
            settled, self._settled = self._settled, []
            carry(read(self._core, settled), wire.call)
            if time.monotonic() >= sweep_at:
                carry(sweep(self._core), wire.call)
                carry(ask_about_models(self._core), wire.call)
                sweep_at = time.monotonic() + SWEEP_S

    def _on_push(self, push: Sequence[Any]) -> None:
        self._settled += self._core.settled_ids(push)
