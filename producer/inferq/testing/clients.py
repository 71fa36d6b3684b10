"""`Client` and `AsyncClient` on a worker in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from inferq.producer.aio import AsyncClient
from inferq.producer.async_session import AsyncSession
from inferq.producer.client import Client
from inferq.producer.outgoing import Outgoing
from inferq.producer.pending import DEFAULT_WAIT_S, AsyncPending, Pending, Result
from inferq.producer.session import Session
from inferq.shared.errors import InferqError
from inferq.shared.resp import Command, Reply
from inferq.shared.settings import Settings
from inferq.testing.exchange import Exchange
from inferq.testing.models import Served
from inferq.testing.worker import FakeWorker, SeenRequest

#: Nobody connects to it.
_NOWHERE: Final = "redis://inferq.testing"


class _FakePending(Pending):
    """Resolved when `submit` returns, or never: nobody waits for it."""

    __slots__ = ()

    def result(self, timeout: float | None = DEFAULT_WAIT_S) -> Result:
        return self.get()


class _FakeAsyncPending(AsyncPending):
    """The same for asyncio."""

    __slots__ = ()

    async def result(self, timeout: float | None = DEFAULT_WAIT_S) -> Result:
        return self.get()


class _FakeSession(Session):
    """Has an exchange in place of connections."""

    def __init__(self, settings: Settings, worker: FakeWorker) -> None:
        super().__init__(settings)
        self._exchange = Exchange(self.core, worker)

    def make(self, outgoing: Outgoing, now: float) -> Pending:
        return self._exchange.enter(_FakePending(self.core, outgoing, now, self._cancel))

    def _call(self, commands: Sequence[Command]) -> list[Reply]:
        return self._exchange.call(commands)


class _FakeAsyncSession(AsyncSession):
    """Has an exchange in place of a connection."""

    def __init__(self, settings: Settings, worker: FakeWorker) -> None:
        super().__init__(settings)
        self._exchange = Exchange(self.core, worker)

    def make(self, outgoing: Outgoing, now: float) -> AsyncPending:
        return self._exchange.enter(_FakeAsyncPending(self.core, outgoing, now, self._cancel))

    async def _call(self, commands: Sequence[Command]) -> list[Reply]:
        await asyncio.sleep(0)  # other tasks run here, as they do while Redis is asked
        return self._exchange.call(commands)


class Controls:
    """What a test sets and asks."""

    _worker: FakeWorker

    def fails(self, model: str, error: InferqError, *, times: int | None = None) -> None:
        """Have the next `times` requests of `model` fail with `error`; None: all from now on.

        What a client raises before it pushes, `submit` raises; anything else is the request's
        result. With ResultTimeout the request is never answered: `result` raises it at once, and
        the request can be cancelled. A later call takes the place of an earlier one.
        ConfigError: no such model, no error of inferq's.
        """
        self._worker.fail(model, error, times)

    def recovers(self, model: str) -> None:
        """Have `model` answer again. ConfigError: no such model."""
        self._worker.recover(model)

    def requests(self, model: str) -> list[SeenRequest]:
        """The requests of `model` so far that passed the checks, also those that `fails` is for.

        ConfigError: no such model.
        """
        return self._worker.seen(model)


class FakeClient(Controls, Client):
    """A `Client` that answers with `models`, in the caller's thread, before `submit` returns.

    `models`: name → a class of `inferq.model`, which is loaded here, an object of one, or what
    `fake_model` makes of a function. ConfigError names the one that is wrong.
    """

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._worker = FakeWorker(models)
        super().__init__(settings=Settings.load(redis_url=_NOWHERE))

    def _open(self) -> Session:
        return _FakeSession(self._settings, self._worker)


class FakeAsyncClient(Controls, AsyncClient):
    """What `FakeClient` is, for asyncio. The models run in the event loop's thread."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._worker = FakeWorker(models)
        super().__init__(settings=Settings.load(redis_url=_NOWHERE))

    def _open(self) -> AsyncSession:
        return _FakeAsyncSession(self._settings, self._worker)
