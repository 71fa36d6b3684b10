"""Whose it is to publish a chord's body: Celery's claim in Redis, which here names a worker.

Celery gives each claim a name at random, and lets it lapse after 10 s. A request whose worker died
comes back within a second or two: its claim then stood in its own way, and the body was never
published. Here a claim names its worker's incarnation, and who finds one of a dead worker takes it.
"""

from __future__ import annotations

from typing import Final

import redis

from inferq.shared.lua import source
from inferq.shared.names import Names

_PREFIX: Final = "inferq:"


class ChordClaims:
    """The claims of one worker. For one thread."""

    def __init__(self, client: redis.Redis, names: Names) -> None:
        self._client = client
        self._names = names
        self._let_go = client.register_script(source("let_go"))
        self._incarnation = ""
        #: Whether the present claim is to stay: the worker ends before the body is published.
        self.stays = False

    def begin(self, incarnation: str) -> None:
        """What is claimed from now on is claimed by this incarnation."""
        self._incarnation = incarnation
        self.stays = False

    @property
    def token(self) -> str:
        """What stands in its claims."""
        return f"{_PREFIX}{self._incarnation}"

    def free(self, key: str | bytes) -> bool:
        """Whether the claim in `key` was a dead worker's; it is gone then."""
        found = self._client.get(key)
        text = found.decode(errors="replace") if isinstance(found, bytes) else ""
        if not text.startswith(_PREFIX):
            return False  # one of Celery's own workers has it, or nobody any more
        fence = self._names.fence(text.removeprefix(_PREFIX))
        return bool(self._let_go(keys=[key, fence], args=[text]))
