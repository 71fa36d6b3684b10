"""What a worker holds: claims, and each request's place in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec


@dataclass(eq=False)
class Claim:
    """A worker's lease on a set of requests: one Redis list, in the order they were taken.

    Item j (0 is the oldest) stands at index ``-(j+1)``, since LMOVE pushed each to the left.
    """

    key: str
    model: str
    step: int
    size: int
    #: False until every message was decoded without killing the process; Redis knows it too.
    decoded: bool = False
    #: When its messages came.
    claimed_redis_ms: float = 0.0
    #: Places whose request is settled, or is being settled by a MULTI without an answer yet.
    settled: set[int] = field(default_factory=set)
    #: What the budget counts: requests, and bytes of each but those that are known by place.
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
    """A claim and the messages to take on from it, oldest first; None where there is none to.

    `adopted`: it is no fresh one, so requests of it may have a result already.
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
    """How many requests to claim from one queue of one priority step."""

    model: str
    step: int
    count: int
