"""What a worker was to serve and does not, and why: one word for logs, stats, pages and probes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from inferq.workers.logs.printing import plain

#: Workers publish it every few seconds.
MAX_REASON_CHARS: Final = 500


class NotServed(msgspec.Struct, frozen=True):
    """A model, or a version that was passed over, since an older one of that model is complete.

    Build it with `not_served`: a folder's name and an error's text may hold anything.
    """

    model: str
    reason: str
    #: The version that was passed over; None: no version is served.
    version: int | None = None

    def __str__(self) -> str:
        which = "" if self.version is None else f" version {self.version}"
        return f"{self.model}{which}: {self.reason}"


def not_served(model: str, reason: str, version: int | None = None) -> NotServed:
    """With all that a terminal or an encoding would stumble over escaped."""
    text = plain(" ".join(reason.split()))
    if len(text) > MAX_REASON_CHARS:
        text = text[:MAX_REASON_CHARS] + "…"
    return NotServed(plain(model), text, version)


def listed(found: Iterable[NotServed]) -> str:
    """All of them on one line; empty if there are none."""
    return "; ".join(map(str, found))
