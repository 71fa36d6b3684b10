"""What one process of a sync client holds open: idle connections, the listener, the core."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from inferq.producer.core import CLOSED, Core
from inferq.producer.dialogue import Dialogue, T, cancel, carry, greet
from inferq.producer.listener import Listener
from inferq.producer.outgoing import Outgoing
from inferq.producer.pending import Pending
from inferq.producer.wires import Wires
from inferq.shared.connect import redis_client
from inferq.shared.resp import Command, Reply
from inferq.shared.settings import Settings


class Session:
    """Connects when first used. Any thread may use it. It lives as long as one of its requests."""

    def __init__(self, settings: Settings) -> None:
        self._redis = redis_client(settings.redis_url, sentinel_master=settings.sentinel_master)
        self._wires = Wires(self._redis)
        self._close_wires = weakref.finalize(self, self._wires.close)
        self._starting = threading.Lock()
        self._stop: weakref.finalize[Any, Any] | None = None
        self.core = Core(settings)

    def carry(self, dialogue: Dialogue[T]) -> T:
        """Have a dialogue with Redis. Raises RedisUnavailable."""
        return carry(dialogue, self._call)

    def _call(self, commands: Sequence[Command]) -> list[Reply]:
        if self._stop is None:
            self._start()
        return self._wires.call(commands)

    def _start(self) -> None:
        with self._starting:
            if self._stop is None:
                self.core.check_open()
                carry(greet(self.core), self._wires.call)
                listener = Listener(self.core, self._redis)
                listener.start()
                self._stop = weakref.finalize(self, listener.stop)
                if self.core.ended:  # closed meanwhile: it may not have seen the listener
                    self._stop()

    def make(self, outgoing: Outgoing, now: float) -> Pending:
        """See `Core.build`."""
        return Pending(self.core, outgoing, now, self._cancel)

    def _cancel(self, pending: Pending) -> bool:
        return self.carry(cancel(self.core, pending))

    def close(self) -> None:
        """Stop. What is unresolved ends as ClientClosed. Idempotent.

        A thread that is pushing goes on until Redis has answered it, which a timeout bounds.
        """
        self.core.end(CLOSED)
        if self._stop is not None:
            self._stop()
        self._close_wires()

    def abandon(self) -> None:
        """In a forked child: leave the parent's connections, and what waits on them, alone."""
        if self._stop is not None:
            self._stop.detach()
        self.core.abandon("submitted before this process was forked; its parent gets the result")
