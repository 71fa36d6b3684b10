"""Notes in Redis for which request a worker publishes, so that its death is counted on that one.

What waits behind it is not noted: it is not to blame.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec
import redis
from msgspec.structs import replace
from redis.exceptions import RedisError

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.workers.claims.recovery import linking_field
from inferq.workers.claims.wrong_type import is_wrong_type


class _Noted(msgspec.Struct, frozen=True):
    incarnation: str
    model: str
    field: str
    #: Its worker lived.
    is_over: bool = False


_NONE = _Noted("", "", "")


class InHand:
    """The one request whose links are being published. For one thread."""

    def __init__(self, client: redis.Redis, names: Names) -> None:
        self._names = names
        self._note = client.register_script(source("linking"))
        self._noted = _NONE

    def begins(self, incarnation: str, model: str, request_id: str) -> None:
        """Note this one, in place of the one before. It may be repeated after redis errors."""
        self._replace(_Noted(incarnation, model, linking_field(request_id)))

    def published(self) -> None:
        """No worker died of this one: what is counted on it is to be forgotten."""
        self._noted = replace(self._noted, is_over=True)

    def rest(self) -> None:
        """None is in hand. Where Redis does not take that, it is told with the next one."""
        if self._noted.field:
            with suppress(RedisError):
                self._replace(_NONE)

    def _replace(self, new: _Noted) -> None:
        names, old = self._names, self._noted
        try:
            self._note(
                keys=[
                    names.fence(new.incarnation),
                    names.running(new.incarnation),
                    names.running(old.incarnation),
                    names.attempts(old.model),
                ],
                args=[_member(new), _member(old), old.field if old.is_over else ""],
            )
        except RedisError as problem:
            if not is_wrong_type(problem):
                raise
        self._noted = new


def _member(noted: _Noted) -> str:
    return f"{noted.model}/{noted.field}" if noted.field else ""
