"""What a worker was told to serve and does not, and why; for logs, stats, pages and probes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from inferq.workers.logs.printing import plain

#: Longest reason: workers publish it every few seconds.
MAX_REASON_CHARS: Final = 500


class NotServed(msgspec.Struct, frozen=True):
    """A model, or a version in whose place an older, complete one is served.

    Made by `not_served`, since a folder's name and an error's text may contain anything.
    """

    model: str
    reason: str
    #: The version that was passed over; None: no version is served.
    version: int | None = None

    def __str__(self) -> str:
        which = "" if self.version is None else f" version {self.version}"
        return f"{self.model}{which}: {self.reason}"


def not_served(model: str, reason: str, version: int | None = None) -> NotServed:
    """A NotServed with control characters, and what no encoding takes, escaped."""
    text = plain(" ".join(reason.split()))
    if len(text) > MAX_REASON_CHARS:
        text = text[:MAX_REASON_CHARS] + "…"
    return NotServed(plain(model), text, version)


def listed(found: Iterable[NotServed]) -> str:
    """All of them in one line; empty if there are none."""
    return "; ".join(map(str, found))
