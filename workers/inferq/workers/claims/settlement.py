"""Hop 6. One MULTI stores a request's one result, tells who waits, and acknowledges the request.

Every command is idempotent, so a MULTI whose answer was lost is simply sent again. SET … NX keeps
the first result; LSET and UNLINK of a settled place change nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgpack
import msgspec

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.shared.resp import Command, Reply
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.runs import Run
from inferq.workers.claims.verdicts import Failed, Revoked

#: Most dead letters kept per model (the newest), and most bytes that they may take in Redis.
DEAD_LETTERS_KEPT: Final = 10_000
DEAD_LETTERS_BYTES: Final = 256 * 1024 * 1024
#: Quarantined ones among them: if there are more than the first number, the oldest are dropped
#: until the second number is left.
QUARANTINED_KEPT: Final = 1_000
QUARANTINED_LEFT: Final = 900
#: How a quarantined letter begins: ``quarantined`` is the first key of its map.
QUARANTINED_MARK: Final = b"\x88\xabquarantined"
#: How long dead letters are kept after the last one, in seconds.
DEAD_LETTERS_S: Final = 7 * 24 * 3600
#: How long the claim-checked payload of a dead letter is kept, in seconds.
DEAD_PAYLOAD_S: Final = DEAD_LETTERS_S
#: See letters.lua; KEYS and ARGV are its arguments in their order.
KEEP_LETTERS: Final = source("letters") + "return keep_letters(KEYS[1], KEYS[2], unpack(ARGV))\n"

#: Most keys in one command: Lua, which is used on a full Redis, takes a few thousand.
KEYS_AT_ONCE: Final = 1_000
_KEEP_LETTERS: Final = KEEP_LETTERS.encode()

#: How a request may end, as metrics have it.
SUCCESS: Final = "success"
FAILURE: Final = "failure"
REVOKED: Final = "revoked"
DEAD_LETTER: Final = "dead_letter"
#: A result was stored before: the client cancelled it, or another worker computed it.
OVERTAKEN: Final = "overtaken"


class Settlement(msgspec.Struct, frozen=True, eq=False):
    """How one request ended.

    `outcome` is its encoded result meta. It is empty if nobody can be answered, or if Celery's own
    handler takes the request over. `before`: commands for the same MULTI, such as that hand-over.
    """

    slot: Slot
    model: str
    request_id: str | None
    outcome: bytes
    #: Store nothing: the request said ``ignore_result``.
    ignore_result: bool = False
    reply: str | None = None
    running: bool = False
    attempts: int = 0
    #: Its field of attempts:<m>, if workers died decoding it or publishing its links.
    attempts_field: str | None = None
    payload_keys: tuple[str, ...] = ()
    dead_letter: bytes | None = None
    #: The dead letter holds bytes that no worker can read: it is dropped before others are.
    quarantined: bool = False
    before: tuple[Command, ...] = ()
    #: Called once the MULTI was answered.
    after: Callable[[], None] | None = None
    #: success, failure, revoked or dead_letter; None: it does not end here, or had ended before.
    ending: str | None = None
    #: Why it is no success; None: it is one, or that is not known.
    ended: Failed | Revoked | None = None
    #: Wire code of a failure for which `ended` does not stand.
    error: str | None = None
    #: When the client sent it (Redis ms), if that says so.
    sent_ms: float | None = None
    #: The run that computed it, if one did.
    run: Run | None = None
    #: Its result was stored ahead of this MULTI, for tasks that follow it and read it.
    stored: bool = False
    #: The whole message, if it has links, a chain or a chord: these are published ahead of this.
    canvas: bytes | None = None

    @property
    def error_code(self) -> str:
        """The wire code of a failure."""
        if self.error is not None:
            return self.error
        return self.ended.error.code if isinstance(self.ended, Failed) else ""


@dataclass(frozen=True, slots=True)
class Settle:
    """Commands that settle some requests, and which reply decides which request.

    They are part of a fenced MULTI, `storing` ahead of `releasing`.
    """

    #: Commands that store results and dead letters and tell who waits; sent again if Redis goes
    #: back.
    storing: list[Command]
    #: All others: for claims, payloads, and what is handed to Celery.
    releasing: list[Command]
    #: (index of the reply that decides it, place among the settlements) of each stored result.
    _deciding: list[tuple[int, int]]

    @property
    def commands(self) -> list[Command]:
        """All of them, in the order of their replies."""
        return self.storing + self.releasing

    @classmethod
    def of(  # noqa: C901 - one loop: what is done for each request, a call would make dearer
        cls,
        settlements: Iterable[Settlement],
        names: Names,
        incarnation: str,
        result_expires_s: int,
    ) -> Settle:
        """The commands for `settlements`, whose places in their claims are settled from here on."""
        storing: list[Command] = []
        releasing: list[Command] = []
        deciding: list[tuple[int, int]] = []
        replies: defaultdict[str, list[str]] = defaultdict(list)
        touched: defaultdict[Claim, list[int]] = defaultdict(list)
        stopped: list[str] = []
        absolved: defaultdict[str, list[str]] = defaultdict(list)
        garbage: list[str] = []
        stored: list[str] = []
        #: Model with new dead letters → how many of these are quarantined.
        letters: Counter[str] = Counter()
        for place, done in enumerate(settlements):
            releasing += done.before
            if done.request_id is not None and done.outcome and not done.ignore_result:
                if not done.stored:
                    deciding.append((len(storing), place))
                key = names.meta(done.request_id)
                storing.append(("SET", key, done.outcome, "EX", result_expires_s, "NX"))
                stored.append(key)
                if done.reply is not None:
                    replies[done.reply].append(done.request_id)
            if done.dead_letter is not None:
                storing += _dead_letter(names, done, done.dead_letter)
                letters[done.model] += done.quarantined
            else:
                garbage += done.payload_keys
            if done.running and done.request_id is not None:
                stopped.append(f"{done.model}/{done.request_id}")
            if done.attempts and done.request_id is not None:
                absolved[done.model].append(done.request_id)
            if done.attempts_field is not None:
                absolved[done.model].append(done.attempts_field)
            done.slot.claim.settled.add(done.slot.index)
            touched[done.slot.claim].append(done.slot.index)
        storing += [_keep_letters(names, model, added) for model, added in letters.items()]
        storing += _telling(stored, replies)
        releasing += _ending(names, incarnation, touched)
        if stopped:
            releasing.append(("SREM", names.running(incarnation), *stopped))
        for model, fields in absolved.items():
            releasing.append(("HDEL", names.attempts(model), *fields))
        for at in range(0, len(garbage), KEYS_AT_ONCE):
            releasing.append(("UNLINK", *garbage[at : at + KEYS_AT_ONCE]))
        return cls(storing, releasing, deciding)

    def overtaken(self, replies: Sequence[Reply]) -> frozenset[int]:
        """Places of the settlements whose request had a result already; `replies`: to `commands`.

        Settlements with `stored` are not among them: the result that is there is their own.
        """
        if None not in replies:
            return frozenset()
        return frozenset(place for index, place in self._deciding if replies[index] is None)


def _dead_letter(names: Names, done: Settlement, letter: bytes) -> Iterator[Command]:
    dead = names.dead(done.model)
    yield ("LREM", dead, 1, letter)  # of a MULTI whose answer was lost
    yield ("LPUSH", dead, letter)
    if not done.quarantined:
        yield ("LTRIM", dead, 0, DEAD_LETTERS_KEPT - 1)
    for key in done.payload_keys:
        yield ("EXPIRE", key, DEAD_PAYLOAD_S)


def _telling(stored: Sequence[str], replies: Mapping[str, Sequence[str]]) -> Iterator[Command]:
    """Commands that tell who waits: the results under the keys `stored`; ids by reply channel."""
    for at in range(0, len(stored), KEYS_AT_ONCE):
        keys = stored[at : at + KEYS_AT_ONCE]
        yield ("EVAL", source("publish"), len(keys), *keys)
    for channel, ids in replies.items():
        yield ("PUBLISH", channel, msgpack.packb(ids))


def _ending(
    names: Names, incarnation: str, touched: Mapping[Claim, Sequence[int]]
) -> Iterator[Command]:
    """Commands that blank the settled places of claims and delete claims with nothing left."""
    finished = [claim.key for claim in touched if claim.complete]
    for claim, places in touched.items():
        if not claim.complete:
            for place in places:
                yield ("LSET", claim.key, -(place + 1), b"")
    if finished:
        yield ("UNLINK", *finished)
        yield ("HDEL", names.claims(incarnation), *finished)


def _keep_letters(names: Names, model: str, added: int) -> Command:
    return (
        "EVAL", KEEP_LETTERS, 2, names.dead(model), names.quarantined(model), added,
        QUARANTINED_KEPT, QUARANTINED_LEFT, DEAD_LETTERS_BYTES, DEAD_LETTERS_S, QUARANTINED_MARK,
    )  # fmt: skip


def without_scripts(commands: Iterable[Command]) -> list[Command]:
    """`commands` of a Settle (each word as bytes), to run in a script: that may call no other."""
    out: list[Command] = []
    for command in commands:
        if command[0] == b"EVAL":  # force.lua does the same for these
            what = b"LETTERS" if command[1] == _KEEP_LETTERS else b"TELL"
            out.append((what, *command[3:]))
        else:
            out.append(command)
    return out
