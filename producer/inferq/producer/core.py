"""What the sync and the asyncio client share: everything but the I/O.

The core admits and encodes requests, keeps the table of those that are unresolved, and returns what
to ask Redis; a client hands it the replies. Several threads may use it at once: each step is one
operation on a dict. A request that two threads resolve keeps its first outcome.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec

from inferq.producer.admission import Admission, ModelView
from inferq.producer.outcome import outcome_of
from inferq.producer.outgoing import Encoder, Inputs, Outgoing, arrays_of
from inferq.producer.pending import Outcome, PendingRequest
from inferq.producer.splitting import Joiner, is_beyond_a_batch, pieces
from inferq.shared import codec
from inferq.shared.casting import cast_safely
from inferq.shared.connect import judge_server, parse_info
from inferq.shared.errors import (
    ClientClosed,
    InferqError,
    InvalidInput,
    RedisUnavailable,
    ResultExpired,
)
from inferq.shared.resp import Command, Reply, ReplyError
from inferq.shared.schema import Array, check_inputs, check_outputs
from inferq.shared.settings import Settings

#: Why a request of a closed client has no result.
CLOSED: Final = "the client was closed before the result came; the request goes on"
REFUSED: Final = "the client is closed: nothing was sent"
#: Seconds between two reads of all unresolved requests' results, whether or not Redis reported any.
SWEEP_S: Final = 5.0
#: Longest wait between two attempts to reconnect, in seconds.
MAX_BACKOFF_S: Final = 1.0
#: If less than one in `_PATIENT_SHARE` requests has settled, reading waits `_PATIENCE_S` for more.
_PATIENT_SHARE: Final = 16
_PATIENCE_S: Final = 0.001
#: Most results that one command asks for: keys, and their expected bytes.
_MGET_KEYS: Final = 64
_MGET_BYTES: Final = 8 * 1024 * 1024

P = TypeVar("P", bound=PendingRequest)


class Core:
    """One client's state."""

    def __init__(self, settings: Settings) -> None:
        self.names = settings.names()
        self.client_id = uuid.uuid4().hex
        self.channel = self.names.reply(self.client_id)
        self.admission = Admission(self.names)
        self._channel_bytes = self.channel.encode()
        self._expires_s = settings.result_expires_s
        self._origin = f"{os.getpid()}@{socket.gethostname()}"
        self._encoders: dict[str, Encoder] = {}
        self._table: dict[str, PendingRequest] = {}
        #: Set by the first `end`.
        self.ended = False
        self._why_ended = ""
        self._run_id = ""
        #: Ids of requests that Redis may have lost in a restart, oldest first.
        self._maybe_lost: dict[str, None] = {}
        #: When (monotonic seconds) every stored result had last been read.
        self._complete_at = time.monotonic()
        self._mean_bytes = 4096.0

    # --- handing over ---------------------------------------------------------------------------

    def build(
        self,
        view: ModelView,
        inputs: Inputs,
        priority: int | None,
        timeout_ms: float | None,
        make: Callable[[Outgoing, float], P],
        outputs: Sequence[str] | None = None,
    ) -> P:
        """Check and encode one request, count it as pushed, and enter it into the table.

        Raises InvalidInput, PayloadTooLarge, QueueFull or ClientClosed; then nothing was entered.
        """
        self.check_open()
        now = time.monotonic()
        advert = view.advert
        priority = _checked_priority(advert.default_priority if priority is None else priority)
        timeout_ms = _checked_timeout(timeout_ms) or advert.default_timeout_ms
        arrays = arrays_of(view.dtypes, inputs, view.text)
        if advert.casts:
            arrays = cast_safely(advert, arrays)
        wanted = None if outputs is None else check_outputs(advert, outputs)
        try:
            rows = check_inputs(advert, arrays)
        except InvalidInput as problem:
            if not is_beyond_a_batch(advert, problem.detail):
                raise
            return self._split(view, arrays, priority, timeout_ms, make, outputs)
        self.admission.admit(view, rows, now)
        encoder = self._encoders.get(advert.name)
        if encoder is None:
            encoder = Encoder(advert.name, self.names, self.client_id, self._origin)
            self._encoders[advert.name] = encoder
        sent_ms = self.admission.redis_ms(now)
        outgoing = encoder.encode(
            arrays, priority, sent_ms, sent_ms + timeout_ms if timeout_ms else None, wanted
        )
        self.admission.weigh(view, outgoing.nbytes)
        pending = make(outgoing, now)
        pending.labels = advert.labels
        self._table[pending.request_id] = pending
        return pending

    def _split(
        self,
        view: ModelView,
        arrays: Mapping[str, Array],
        priority: int,
        timeout_ms: float,
        make: Callable[[Outgoing, float], P],
        outputs: Sequence[str] | None,
    ) -> P:
        """A request of more rows than a batch may have, in `parts`; all of them, or none, enter."""
        parts: list[P] = []
        try:
            for piece in pieces(view.advert, arrays):
                parts.append(self.build(view, piece, priority, timeout_ms or None, make, outputs))
        except BaseException:
            for part in parts:
                self.drop(part)
            raise
        first = parts[0].outgoing
        assert first is not None
        whole = make(first, parts[0].submitted_at)
        whole.outgoing, whole.parts, whole.labels = None, parts, view.advert.labels
        joiner = Joiner(whole, parts, view.advert.signature)
        for part in parts:
            part.watcher = joiner
        return whole

    def check_open(self) -> None:
        """ClientClosed after `end`."""
        if self.ended:
            raise ClientClosed(REFUSED)

    def pushed(
        self, block: Sequence[PendingRequest], refused: Mapping[str, InferqError]
    ) -> list[InferqError]:
        """Note that a push of `block` has ended. `refused`: id → why. Returns what was refused."""
        for pending in block:
            problem = refused.get(pending.request_id)
            if problem is None:
                pending.accepted = True
            else:
                self.drop(pending, problem)
        # `end` releases accepted requests after it has set `ended`: either it or this sees the
        # request.
        if self.ended:
            self._let_go(block)
        return list(refused.values())

    def drop(self, pending: PendingRequest, outcome: Outcome | None = None) -> None:
        """Take a request out of the table, resolving it with `outcome` if one is given.

        If several threads do so, the one that takes it out of the table resolves it.
        """
        if pending.parts:
            for part in pending.parts:
                self._table.pop(part.request_id, None)
            if outcome is not None:
                pending.resolve(outcome)
        elif self._table.pop(pending.request_id, None) is not None and outcome is not None:
            pending.resolve(outcome)

    def is_served(self, model: str) -> bool:
        """See `pending.Host`."""
        return self.admission.is_served(model, time.monotonic())

    # --- reading results ------------------------------------------------------------------------

    def settled_ids(self, push: Sequence[Any]) -> list[str]:
        """The ids of this client's requests that a RESP3 push reports as settled."""
        if len(push) != 3 or push[0] != b"message" or push[1] != self._channel_bytes:
            return []
        try:
            ids = codec.unpack(push[2])
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
            return []
        if not isinstance(ids, list):
            return []
        known = [one for one in ids if isinstance(one, str) and one in self._table]
        return list(dict.fromkeys(known))

    def patience_s(self, settled: int) -> float:
        """Seconds to wait for more pushes before the results of `settled` requests are read.

        Where hundreds of results are awaited and come one by one, reading each by itself takes most
        of a client's CPU. A millisecond does not matter to any of them.
        """
        return _PATIENCE_S if settled * _PATIENT_SHARE < len(self._table) else 0.0

    def unresolved(self) -> list[str]:
        """The ids of all requests without an outcome."""
        return list(self._table)

    def models(self) -> set[str]:
        """The models of all requests without an outcome."""
        return {pending.model for pending in list(self._table.values())}

    def blocks(self, ids: Sequence[str]) -> Iterator[list[str]]:
        """`ids` in portions, each for one command."""
        start = 0
        while start < len(ids):
            keys = max(1, min(_MGET_KEYS, int(_MGET_BYTES / self._mean_bytes)))
            yield list(ids[start : start + keys])
            start += keys

    def ask(self, ids: Sequence[str]) -> Command:
        """The command that reads the results of `ids`."""
        return ("MGET", *[self.names.meta(one) for one in ids])

    def take(self, ids: Sequence[str], reply: Reply) -> None:
        """Resolve those of `ids` whose result is in `reply`, the answer to `ask`."""
        if isinstance(reply, ReplyError):
            raise RedisUnavailable(f"Redis refused to hand out results: {reply}")
        for request_id, raw in zip(ids, reply, strict=True):
            pending = self._table.get(request_id)
            if raw is None or pending is None:
                continue
            self._mean_bytes += 0.1 * (len(raw) - self._mean_bytes)
            outcome = outcome_of(pending, raw)
            if outcome is not None:
                self.drop(pending, outcome)

    def swept(self, asked: Sequence[str], began: float) -> None:
        """Note that the results of all of `asked` have been read since `began` (monotonic seconds).

        If Redis was out of reach so long that a result may have been stored and have expired, its
        request ends as ResultExpired.
        """
        gap, self._complete_at = began - self._complete_at, began
        if gap <= self._expires_s:
            return
        for request_id in asked:
            pending = self._table.get(request_id)
            if pending is not None and pending.submitted_at < began - self._expires_s:
                error = ResultExpired(
                    f"request {request_id}: Redis was out of reach for {gap:.0f} s and has no "
                    f"result of it now; results are kept {self._expires_s} s (result_expires_s)"
                )
                self.drop(pending, error)

    # --- Redis itself ---------------------------------------------------------------------------

    def greet(self) -> list[Command]:
        """The commands that find out what server this is, on a new connection."""
        return [("INFO", "server"), ("INFO", "cluster")]

    def greeted(self, replies: Sequence[Reply]) -> None:
        """Take the replies to `greet`, and note whether Redis was restarted since the last ones.

        ConfigError if it is a server that cannot be used, RedisUnavailable if it refuses to say.
        """
        sections = []
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise RedisUnavailable(f"Redis refused to tell what it is: {reply}")
            sections.append(parse_info(reply))
        known, self._run_id = self._run_id, judge_server(*sections).run_id
        if known not in ("", self._run_id):
            self._maybe_lost.update(dict.fromkeys(list(self._table)))
            self._complete_at = time.monotonic()

    def lost(self) -> list[Outgoing]:
        """The requests to push again: Redis may have lost them in a restart."""
        found = [self._table.get(request_id) for request_id in self._maybe_lost]
        kept = [pending.outgoing for pending in found if pending is not None]
        return [outgoing for outgoing in kept if outgoing is not None]

    def pushed_again(self) -> None:
        """Note that Redis has taken all requests that were `lost`."""
        self._maybe_lost.clear()

    # --- taking back ----------------------------------------------------------------------------

    def revoke(self, pending: PendingRequest) -> list[Command]:
        """The commands that try to cancel: store REVOKED unless there is a result; read it."""
        key = self.names.meta(pending.request_id)
        done_at = datetime.now(UTC).isoformat()
        meta = codec.encode_revoked(pending.request_id, "cancelled", done_at)
        return [("SET", key, meta, "NX", "EX", self._expires_s), ("MGET", key)]

    def revoked(self, pending: PendingRequest, replies: Sequence[Reply]) -> list[Command]:
        """Take the replies to `revoke`; return what tells others (Celery's) of a success."""
        stored, found = replies
        if isinstance(stored, ReplyError):
            raise RedisUnavailable(f"Redis refused to cancel: {stored}")
        self.take([pending.request_id], found)
        if stored is None:
            return []
        return [("PUBLISH", self.names.meta(pending.request_id), found[0])]

    # --- the end --------------------------------------------------------------------------------

    def end(self, why: str) -> None:
        """Admit nothing any more, and resolve what Redis has accepted with ClientClosed.

        A request that is being pushed is left to the thread that pushes it. That thread learns
        whether it was accepted, and nobody else waits for it yet.
        """
        if not self.ended:
            self._why_ended = why
            self.ended = True
        self._let_go(list(self._table.values()))

    def _let_go(self, pendings: Iterable[PendingRequest]) -> None:
        for pending in pendings:
            if pending.accepted:
                self.drop(pending, self._closed(pending))

    def _closed(self, pending: PendingRequest) -> ClientClosed:
        return ClientClosed(f"request {pending.request_id}: {self._why_ended}")

    def abandon(self, why: str) -> None:
        """In a forked child: resolve everything, since no thread that was pushing exists here."""
        pendings = list(self._table.values())
        for pending in pendings:
            if pending.watcher is not None:
                pending.watcher.forked()
        self.end(why)
        for pending in pendings:
            self.drop(pending, self._closed(pending))


def _checked_priority(priority: int) -> int:
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
        raise InvalidInput(f"priority {priority!r}; expected a whole number from 0 (first) to 9")
    return priority


def _checked_timeout(timeout_ms: float | None) -> float | None:
    number = isinstance(timeout_ms, int | float) and not isinstance(timeout_ms, bool)
    if timeout_ms is not None and not (number and 0 < timeout_ms < float("inf")):
        raise InvalidInput(f"timeout_ms {timeout_ms!r}; expected milliseconds above 0")
    return timeout_ms
