"""Hop 6. One terminal result per request: stored, told to who waits, acknowledged: in one MULTI.

Every command is idempotent, so a MULTI whose answer was lost is simply sent again: SET … NX keeps
the first result, LSET and UNLINK of a place that is settled change nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgpack
import msgspec

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.shared.resp import Command, Reply
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.runs import Run
from inferq.workers.claims.verdicts import Failed, Revoked

#: Newest dead letters kept per model, and bytes that they may take in Redis.
DEAD_LETTERS_KEPT: Final = 10_000
DEAD_LETTERS_BYTES: Final = 256 * 1024 * 1024
#: Of these, quarantined ones: beyond the first number the oldest go, until the second is left.
QUARANTINED_KEPT: Final = 1_000
QUARANTINED_LEFT: Final = 900
#: What a quarantined one begins with: ``quarantined`` is the first key of its map.
QUARANTINED_MARK: Final = b"\x88\xabquarantined"
#: How long dead letters are kept after the last one, in seconds.
DEAD_LETTERS_S: Final = 7 * 24 * 3600
#: How long the claim-checked payload of a dead letter is kept, in seconds.
DEAD_PAYLOAD_S: Final = DEAD_LETTERS_S
#: See letters.lua; KEYS and ARGV are its arguments in their order.
KEEP_LETTERS: Final = source("letters") + "return keep_letters(KEYS[1], KEYS[2], unpack(ARGV))\n"

#: Most keys that one command names: Lua, which is needed on a full Redis, takes a few thousand.
KEYS_AT_ONCE: Final = 1_000
#: The commands that do nothing else: no claim is touched by them, nor what is handed to Celery.
_STORING: Final = {b"SET", b"PUBLISH", b"EVAL", b"LREM", b"LPUSH", b"LTRIM", b"EXPIRE"}
_KEEP_LETTERS: Final = KEEP_LETTERS.encode()

#: How a request may end, as metrics have it.
SUCCESS: Final = "success"
FAILURE: Final = "failure"
REVOKED: Final = "revoked"
DEAD_LETTER: Final = "dead_letter"
#: Its result was stored before: the client had cancelled it, or it had been computed elsewhere.
OVERTAKEN: Final = "overtaken"


class Settlement(msgspec.Struct, frozen=True, eq=False):
    """How one request ended.

    `outcome` is its encoded result meta; empty where nobody can be answered, or Celery's own
    handler takes it on. `before` are commands that belong into the same MULTI (that hand-over).
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
    #: Its field of attempts:<m>, if workers died decoding it.
    suspect: str | None = None
    payload_keys: tuple[str, ...] = ()
    dead_letter: bytes | None = None
    #: The dead letter is of bytes that no worker can read: it goes before others do.
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
    #: Its result was stored ahead of this, for those to read who are told of it first.
    stored: bool = False
    #: The whole message, if it has links, a chain or a chord: these are published ahead of this.
    canvas: bytes | None = None

    @property
    def error_code(self) -> str:
        """The wire code of a failure."""
        if self.error is not None:
            return self.error
        return self.ended.error.code if isinstance(self.ended, Failed) else ""


def commands(
    settlements: Iterable[Settlement],
    names: Names,
    incarnation: str,
    result_expires_s: int,
) -> list[Command]:
    """The commands that settle `settlements`, to stand inside the MULTI of a fenced round trip."""
    out: list[Command] = []
    replies: defaultdict[str, list[str]] = defaultdict(list)
    touched: defaultdict[Claim, list[int]] = defaultdict(list)
    stopped: list[str] = []
    forgiven: defaultdict[str, list[str]] = defaultdict(list)
    garbage: list[str] = []
    stored: list[str] = []
    #: Model with new dead letters → how many of these are quarantined.
    letters: Counter[str] = Counter()
    for done in settlements:
        out += done.before
        if done.request_id is not None and _stores(done):
            key = names.meta(done.request_id)
            out.append(("SET", key, done.outcome, "EX", result_expires_s, "NX"))
            stored.append(key)
            if done.reply is not None:
                replies[done.reply].append(done.request_id)
        if done.dead_letter is not None:
            dead = names.dead(done.model)
            out.append(("LREM", dead, 1, done.dead_letter))  # of a MULTI whose answer was lost
            out.append(("LPUSH", dead, done.dead_letter))
            if not done.quarantined:
                out.append(("LTRIM", dead, 0, DEAD_LETTERS_KEPT - 1))
            letters[done.model] += done.quarantined
            out += [("EXPIRE", key, DEAD_PAYLOAD_S) for key in done.payload_keys]
        else:
            garbage += done.payload_keys
        if done.running and done.request_id is not None:
            stopped.append(f"{done.model}/{done.request_id}")
        if done.attempts and done.request_id is not None:
            forgiven[done.model].append(done.request_id)
        if done.suspect is not None:
            forgiven[done.model].append(done.suspect)
        done.slot.claim.settled.add(done.slot.index)
        touched[done.slot.claim].append(done.slot.index)
    out += [_keep_letters(names, model, added) for model, added in letters.items()]
    for at in range(0, len(stored), KEYS_AT_ONCE):
        keys = stored[at : at + KEYS_AT_ONCE]
        out.append(("EVAL", source("publish"), len(keys), *keys))
    for channel, ids in replies.items():
        out.append(("PUBLISH", channel, msgpack.packb(ids)))
    finished = [claim for claim in touched if claim.complete]
    for claim, places in touched.items():
        if not claim.complete:
            out += [("LSET", claim.key, -(place + 1), b"") for place in places]
    if finished:
        keys = [claim.key for claim in finished]
        out.append(("UNLINK", *keys))
        out.append(("HDEL", names.claims(incarnation), *keys))
    if stopped:
        out.append(("SREM", names.running(incarnation), *stopped))
    for model, fields in forgiven.items():
        out.append(("HDEL", names.attempts(model), *fields))
    for at in range(0, len(garbage), KEYS_AT_ONCE):
        out.append(("UNLINK", *garbage[at : at + KEYS_AT_ONCE]))
    return out


def _keep_letters(names: Names, model: str, added: int) -> Command:
    return (
        "EVAL", KEEP_LETTERS, 2, names.dead(model), names.quarantined(model), added,
        QUARANTINED_KEPT, QUARANTINED_LEFT, DEAD_LETTERS_BYTES, DEAD_LETTERS_S, QUARANTINED_MARK,
    )  # fmt: skip


def _stores(done: Settlement) -> bool:
    return bool(done.outcome) and not done.ignore_result and done.request_id is not None


def overtaken(
    settlements: Iterable[Settlement], commands: Iterable[Command], replies: Sequence[Reply]
) -> frozenset[int]:
    """Places of those whose result was not stored, as there was one already.

    `commands` are what `commands` made of them, `replies` begin with theirs.
    """
    if None not in replies:
        return frozenset()
    stored = (
        reply
        for command, reply in zip(commands, replies, strict=False)
        if command[0] == "SET" and command[-1] == "NX"
    )
    return frozenset(
        place
        for place, done in enumerate(settlements)
        if _stores(done) and next(stored) is None and not done.stored
    )


def without_scripts(commands: Iterable[Command]) -> list[Command]:
    """What `commands` made (each word as bytes), to run in a script: that may call no other."""
    out: list[Command] = []
    for command in commands:
        if command[0] == b"EVAL":  # of which force.lua does the same
            what = b"LETTERS" if command[1] == _KEEP_LETTERS else b"TELL"
            out.append((what, *command[3:]))
        else:
            out.append(command)
    return out


def storing(commands: Iterable[Command]) -> list[Command]:
    """Of what `commands` made (each word as bytes): results, who is told of them, dead letters."""
    return [command for command in commands if command[0] in _STORING]
