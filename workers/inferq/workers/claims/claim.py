"""What a worker holds: claims, and the places of requests in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec


@dataclass(eq=False)
class Claim:
    """Requests that a worker holds under its lease: one Redis list, in the order they were claimed.

    Item j (0 is the oldest) has the index ``-(j+1)``, since LMOVE pushed each to the left end.
    """

    key: str
    model: str
    step: int
    size: int
    #: False until every message was decoded without killing the process; Redis knows it too.
    decoded: bool = False
    #: When its messages came.
    claimed_redis_ms: float = 0.0
    #: Places of requests that are settled, or in a MULTI whose answer has not come yet.
    settled: set[int] = field(default_factory=set)
    #: What the budget counts: its requests, and the bytes of each, except those in `whole`, by
    #: place.
    held: int = 0
    each: int = 0
    whole: dict[int, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.settled) == self.size


class Slot(msgspec.Struct, frozen=True):
    """One request's place in its claim."""

    claim: Claim
    index: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claim and the messages to take from it, oldest first; None where there is none to take.

    `adopted`: it is not a new claim, so some of its requests may have a result already.
    """

    claim: Claim
    messages: Sequence[bytes | None]
    adopted: bool = False

    @property
    def places(self) -> list[int]:
        """The places of these messages in the claim."""
        return [place for place, message in enumerate(self.messages) if message is not None]


@dataclass(frozen=True, slots=True)
class Want:
    """How many requests to claim from one queue, of one priority step."""

    model: str
    step: int
    count: int
