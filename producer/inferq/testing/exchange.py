"""Stands for Redis: answers what a client's dialogues ask, and hands it its results at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final, TypeVar

from inferq.producer.core import Core
from inferq.producer.dialogue import carry, read
from inferq.producer.pending import PendingRequest
from inferq.shared.resp import Command, Reply
from inferq.testing.worker import WORKER, FakeWorker

#: Those of which a client reads only whether Redis refused them.
_TAKEN: Final = frozenset({"LPUSH", "MULTI", "SET", "PUBLISH"})
_LEASE_MS: Final = 3_600_000

P = TypeVar("P", bound=PendingRequest)


class Exchange:
    """Between one session and the worker."""

    def __init__(self, core: Core, worker: FakeWorker) -> None:
        self._core = core
        self._worker = worker
        self._adverts = {core.names.model(name): told for name, told in worker.announced().items()}
        #: Results that the client has not read.
        self._results: dict[str, bytes] = {}
        #: Requests that are never answered, by id.
        self._unanswered: dict[str, PendingRequest] = {}
        # A thread returns from `submit` only once its result, which another may hand out, is there.
        self._handing_out = threading.Lock()

    def enter(self, pending: P) -> P:
        """Have a request answered, before it is pushed; raise the error that refuses it."""
        assert pending.outgoing is not None
        key = self._core.names.meta(pending.request_id)
        # Several objects may stand for one request: it is answered once.
        if key not in self._results and pending.request_id not in self._unanswered:
            result = self._worker.answer(pending.outgoing)
            if result is None:
                self._unanswered[pending.request_id] = pending
            else:
                self._results[key] = result
        return pending

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Redis' replies to `commands`. What they have pushed is resolved then."""
        replies = [self._reply(command) for command in commands]
        if any(command[0] == "LPUSH" for command in commands):
            with self._handing_out:
                self._hand_out()
        return replies

    def _hand_out(self) -> None:
        core = self._core
        carry(read(core, core.unresolved()), lambda asked: [self._reply(each) for each in asked])
        for pending in list(self._unanswered.values()):
            if pending.watcher is not None:  # of a `map`, which would wait for its whole timeout
                core.drop(pending, pending.overdue())
            if pending.done():
                del self._unanswered[pending.request_id]

    def _reply(self, command: Command) -> Reply:
        now_ms = time.time() * 1000
        match command:
            case ("TIME",):
                return [int(now_ms // 1000), int(now_ms % 1000 * 1000)]
            case ("GET", str(key)):
                return self._adverts.get(key)
            case ("ZRANGE", *_):
                return [[WORKER.encode(), now_ms + _LEASE_MS]]
            case ("LLEN", _):
                return 0
            case ("MGET", *keys):
                return [self._results.pop(str(key), None) for key in keys]
            case ("SET", str(key), bytes(meta), "NX", *_):
                if key in self._results:
                    return None
                self._results[key] = meta
                return b"OK"
            case ("EXEC",):
                return []
            case (str(name), *_) if name in _TAKEN:
                return b"OK"
        raise NotImplementedError(f"a fake client has no reply to {command[0]!r:.100}")
