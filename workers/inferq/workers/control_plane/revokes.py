"""Limits how many requests remote control may revoke: all workers share the set of revoked ids.

A broadcast does not say who sent it, so there is no limit per sender. Limited are the ids in one
message, and the ids a second that all messages add: at once, as many as the set holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from celery.worker import state as worker_state

from inferq.shared.codec.messages import MAX_ID_CHARS

#: Most ids that one message revokes, or that a worker sends to another one.
MAX_REVOKED: Final = 10_000
#: Ids a second that are added, on average.
REVOKED_PER_S: Final = 5_000


class TooMany(Exception):
    """The ids are not revoked. The text says why."""


class Revokes:
    """Adds to Celery's revoked ids. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._room = float(worker_state.REVOKES_MAX)
        self._at = clock()

    def add(self, ids: object) -> list[str]:
        """Revoke `ids`, one or a list of them. Raises TooMany; TypeError if they are no ids."""
        named = [ids] if isinstance(ids, str) else ids
        if not isinstance(named, list | tuple | set | None):
            raise TypeError(f"task_id is a {type(ids).__name__}; expected an id or a list of ids")
        if len(named or ()) > MAX_REVOKED:
            raise TooMany(f"{len(named or ())} ids; expected at most {MAX_REVOKED} in one message")
        for each in named or ():
            if not isinstance(each, str) or len(each) > MAX_ID_CHARS:
                raise TypeError(f"an id is {str(each)[:100]!r}; expected {MAX_ID_CHARS} characters")
        wanted = sorted(set(named or ()))
        now = self._clock()
        self._room = min(
            float(worker_state.REVOKES_MAX), self._room + (now - self._at) * REVOKED_PER_S
        )
        self._at = now
        if len(wanted) > self._room:
            raise TooMany(
                f"more ids than {REVOKED_PER_S} a second were revoked lately; try again later"
            )
        self._room -= len(wanted)
        worker_state.revoked.update(wanted)
        return wanted


def newest() -> list[str]:
    """The newest revoked ids, oldest first: as many as one worker sends to another."""
    worker_state.revoked.purge()
    return list(worker_state.revoked)[-MAX_REVOKED:]
