"""Reads dead letters, puts them back into their queues, and drops them.

One script changes one letter, so that meanwhile workers may add letters and others may work on the
same ones: each is replayed or dropped once. A letter is identified by its bytes. Lists are read in
blocks, since a letter may be as large as a message.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import msgspec
import redis

from inferq.shared import codec
from inferq.shared.errors import InferqError, PayloadExpired
from inferq.shared.lua import source
from inferq.shared.names import Names, is_model_name
from inferq.workers.claims.recovery import decoding_field
from inferq.workers.claims.settlement import DEAD_PAYLOAD_S
from inferq.workers.queues.letter import Letter, in_time, payloads_in, priority_in, read_letter

#: Most bytes (estimated by the letters before) and most letters that are asked for at once.
BLOCK_BYTES: Final = 8 * 1024 * 1024
BLOCK_LETTERS: Final = 64
#: How long a payload is kept at least beyond its request's deadline, in seconds.
PAYLOAD_MARGIN_S: Final = 24 * 3600


class Replayed(msgspec.Struct, frozen=True):
    """The priority step at which a request waits now, and its expired headers, which it lost."""

    step: int
    dropped: list[str]


class DeadLetters:
    """All models' dead letters in one Redis. Its methods raise redis' errors."""

    def __init__(self, client: redis.Redis, names: Names) -> None:
        self._client = client
        self._names = names
        self._dead = client.register_script(source("dead"))

    def now_ms(self) -> float:
        """The time by Redis' clock."""
        seconds, micros = self._client.time()
        return float(seconds) * 1000 + float(micros) / 1000

    def models(self) -> list[str]:
        """The models that have dead letters."""
        head = self._names.dead("")
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", head) + "*"
        found = self._client.scan_iter(match=pattern, count=1000)
        keys = {key.decode(errors="replace") for key in found}  # other programs' keys name no model
        return sorted(m for key in keys if is_model_name(m := key.removeprefix(head)))

    def read(self, model: str) -> Iterator[Letter]:
        """The letters of `model`, newest first: then one that is added meanwhile hides no other."""
        seen: set[bytes] = set()
        start, count = 0, 1
        while block := self._range(model, start, start + count - 1):
            for raw in block:
                letter = read_letter(model, raw)
                if letter.digest not in seen:
                    seen.add(letter.digest)
                    yield letter
            start += len(block)
            count = _next_count(block)

    def pick(self, model: str, digests: Collection[bytes]) -> Iterator[Letter]:
        """The letters of `model` with these digests, oldest first. Each may be removed at once.

        Letters that others have removed meanwhile are left out.
        """
        wanted = set(digests)
        missing = -1
        while wanted and len(wanted) != missing:
            missing = len(
                wanted
            )  # removals by others may have moved some past this place: look again
            passed, count = 0, 1
            while wanted and (block := self._range(model, -passed - count, -passed - 1)):
                picked = 0
                for raw in reversed(block):
                    letter = read_letter(model, raw)
                    if letter.digest in wanted:
                        wanted.discard(letter.digest)
                        picked += 1
                        yield letter
                passed += len(block) - picked
                count = _next_count(block)

    def queue(self, letter: Letter) -> str:
        """The Redis list that its request came from."""
        return self._names.queue(letter.model, self.step(letter))

    def step(self, letter: Letter) -> int:
        """The priority step of that list."""
        return self._names.step(priority_in(letter.message))

    def status(self, letter: Letter) -> str | None:
        """The status of the result that is stored; None if there is none."""
        return _status(self._stored(letter))

    def payloads(self, letter: Letter) -> dict[str, tuple[str, int | None]]:
        """Input name → key and size in bytes of each claim-checked tensor; None: it is gone."""
        return {
            name: (key, int(self._client.strlen(key)) or None)
            for name, key in payloads_in(letter.message, self._names).items()
        }

    def replay(self, letter: Letter) -> Replayed:
        """Put the request back as if it was pushed now, and delete its result and attempts.

        Raises PayloadExpired; InferqError if it has another result, or is no longer a letter.
        """
        if not letter.genuine:
            raise InferqError(f"{letter.reason}; it can only be dropped")
        if letter.is_cut:
            held, size = len(letter.message), letter.size
            raise InferqError(f"{held} of its {size} bytes are kept; it can only be dropped")
        stored = self._stored(letter)
        status = _status(stored)
        if status not in {None, "FAILURE"}:
            raise InferqError(f"its stored result is {status} by now; it can only be dropped")
        now = self.now_ms()
        again = in_time(letter.message, now)
        left_s = (again.deadline_ms - now) / 1000 if again.deadline_ms else 0
        ttl_s = max(DEAD_PAYLOAD_S, PAYLOAD_MARGIN_S + int(left_s))
        fields = [decoding_field(letter.message), *([letter.id] if letter.id else [])]
        self._take_out(letter, ["replay", again.message, stored, ttl_s, *fields])
        return Replayed(self.step(letter), again.dropped)

    def drop(self, letter: Letter) -> None:
        """Delete the letter and its payloads. InferqError if it is no longer a letter."""
        self._take_out(letter, ["drop"])

    def _take_out(self, letter: Letter, how: Sequence[bytes | str | int]) -> None:
        """Run dead.lua; `how`: its arguments after the letter."""
        names = self._names
        payloads = payloads_in(letter.message, names)
        meta = names.meta(letter.id) if letter.id else names.nowhere
        keys = [names.dead(letter.model), self.queue(letter), names.attempts(letter.model), meta]
        ended = self._dead(keys=[*keys, *payloads.values()], args=[letter.raw, *how])
        if ended == b"gone":
            raise InferqError("no dead letter any more: replayed or dropped meanwhile")
        if ended == b"changed":
            raise InferqError("its stored result changed meanwhile; look at it once more")
        for name, key in payloads.items():
            if key.encode() == ended:
                raise PayloadExpired(f"input {name!r}: its payload {key!r} is gone")

    def _stored(self, letter: Letter) -> bytes:
        stored = self._client.get(self._names.meta(letter.id)) if letter.id else None
        return stored if isinstance(stored, bytes) else b""

    def _range(self, model: str, start: int, end: int) -> list[bytes]:
        found: list[bytes] = self._client.lrange(self._names.dead(model), start, end)  # type: ignore[assignment]
        return found


def _next_count(block: list[bytes]) -> int:
    return max(1, min(BLOCK_LETTERS, BLOCK_BYTES // max(1, *map(len, block))))


def _status(stored: bytes) -> str | None:
    if not stored:
        return None
    try:
        return str(codec.decode_meta(stored)["status"])
    except codec.MalformedMessage:
        return "unreadable"
