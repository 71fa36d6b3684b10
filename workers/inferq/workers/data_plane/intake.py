"""Hop 3. Turns claimed messages into requests that may join a batch, or into errors.

Two steps, so that the claim-checked payloads of a whole claim are fetched in one round trip:
`open` reads the message itself, `admit` its tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

from msgspec.structs import replace

from inferq.shared import codec
from inferq.shared.casting import cast_safely
from inferq.shared.errors import (
    DeadlineExceeded,
    InferqError,
    InvalidInput,
    ModelNotFound,
    PayloadExpired,
    PayloadTooLarge,
)
from inferq.shared.names import HEADER_REPLY, TASK, Names, queue_of
from inferq.shared.schema import (
    Array,
    InputCheck,
    ModelAdvert,
    Ticket,
    check_names,
    check_outputs,
    check_size,
    is_text,
    most_bytes,
)
from inferq.workers.batching.padding import Padding
from inferq.workers.batching.waiting import Waiting
from inferq.workers.canvas.following import check_few
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.canvas.place import place_of
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.message import arguments, references_in, unix_ms
from inferq.workers.claims.verdicts import (
    Failed,
    Foreign,
    Opened,
    Quarantined,
    Revoked,
    ScheduledRequest,
)
from inferq.workers.data_plane.foreign_tasks import MAX_BYTES, ForeignTasks, not_registered
from inferq.workers.data_plane.unfetched import text_bytes
from inferq.workers.models.batch_layout import moved

#: A message body may have so many bytes for each byte of its inputs (numbers as text in JSON, in
#: base64), and so many in addition. Decoded, it may take 40 times that: maps in maps.
WRITTEN_OUT: Final = 10
BODY_BYTES: Final = 4 << 20
#: Longest description that is kept with a request, in characters: Celery's own limit.
MAX_REPR_CHARS: Final = 1_024
_ARGUMENTS = frozenset({"inputs", "model", "outputs"})


def _is_str(value: object) -> bool:
    return isinstance(value, str)


class Intake:
    """Reads the messages of one model's queues. Pure, except for the two callables it is given."""

    def __init__(
        self,
        advert: ModelAdvert,
        names: Names,
        padding: Padding,
        is_revoked: Callable[[str], bool],
        redis_ms: Callable[[], float],
        links: LinkQueues,
        foreign: ForeignTasks | None = None,
    ) -> None:
        self._advert = advert
        self._names = names
        self._padding = padding
        self._is_revoked = is_revoked
        self._redis_ms = redis_ms
        #: None: no foreign task is run.
        self._foreign = foreign
        self._links = links
        self._check = InputCheck(advert)
        self._most_body = BODY_BYTES + WRITTEN_OUT * most_bytes(advert)
        self._most_message = min(self._most_body + codec.MAX_HEAD_BYTES, codec.MAX_MESSAGE_BYTES)
        signature = advert.signature
        self._order = [spec.name for spec in signature.inputs]
        self._axes = {spec.name: spec.batch_axis for spec in signature.inputs if spec.batch_axis}
        self._required = frozenset(self._order)
        #: Whether inputs are not taken just as they come.
        self._adapts = bool(advert.casts or signature.optional or self._axes)
        self._optional = frozenset(spec.name for spec in signature.optional)
        self._dtypes = {spec.name: spec.dtype for spec in signature.inputs + signature.optional}
        self._text = [name for name, dtype in self._dtypes.items() if is_text(dtype)]
        #: If no dim but the batch may vary, all requests may share a batch.
        self._varies = any(
            not isinstance(dim, int) for spec in signature.inputs for dim in spec.row_shape
        )

    def open(  # noqa: C901, PLR0912 - the checks of one message, in their order
        self, slot: Slot, message: bytes
    ) -> Opened | Failed | Revoked | Foreign | ScheduledRequest | Quarantined:
        """Read one message. Never raises."""
        if len(message) > self._most_message:
            told = (
                f"the message is {len(message)} bytes; expected at most {self._most_body} of body"
            )
            return self._too_large(slot, message, f"{told} and {codec.MAX_HEAD_BYTES} besides")
        try:
            envelope = codec.decode_envelope(message)
        except codec.MalformedMessage as problem:
            return Quarantined(slot, message, str(problem))
        head = len(message) - len(envelope.body)
        if head > codec.MAX_HEAD_BYTES:
            told = f"the headers and properties are {head} bytes"
            return self._too_large(
                slot, message, f"{told}; expected at most {codec.MAX_HEAD_BYTES}"
            )
        headers = envelope.headers
        if not headers.id:
            return Quarantined(slot, message, "the id header is empty")
        if headers.task != TASK:
            return self._other_task(slot, envelope, message)
        ticket = self._ticket(slot, envelope)
        try:
            if ticket.reply is not None and not self._names.is_reply(ticket.reply):
                told, ticket = ticket.reply[:100], replace(ticket, reply=None)
                raise InvalidInput(
                    f"{HEADER_REPLY} {told!r}; expected a channel {self._names.reply('…')}"
                )
            if headers.compression:
                raise InvalidInput(f"compression {headers.compression!r}; expected none")
            if headers.expires is not None:
                ticket = replace(ticket, expires_ms=unix_ms("expires", headers.expires))
            late = self.too_late(slot, ticket)
            if len(envelope.body) > self._most_body:
                raise PayloadTooLarge(
                    f"the message body is {len(envelope.body)} bytes; "
                    f"expected at most {self._most_body}"
                )
            body = codec.decode_body(envelope)
            given = arguments(body)
            references = references_in(given.get("inputs"))
            if len(references) > len(self._dtypes):
                check_names(self._advert, given["inputs"])
            is_own = self._names.is_payload_of
            own = tuple(key for key in references.values() if is_own(key, ticket.id))
            if own:
                ticket = replace(ticket, payload_keys=own)
            if body.has_canvas:
                place_of(message)
                check_few(body.embed, len(message), self._links)
                ticket = replace(ticket, canvas=message)
            if late is not None:
                return replace(late, ticket=ticket)
            inputs = self._inputs(given)
            outputs = given.get("outputs")
            if outputs is not None:
                outputs = check_outputs(self._advert, outputs)
            for name, key in references.items():
                if key not in own:
                    raise InvalidInput(f"input {name!r}: key {key[:200]!r} is not its payload's")
            if headers.eta is not None:
                due_ms = unix_ms("eta", headers.eta)
                if due_ms > self._redis_ms():
                    return ScheduledRequest(slot, message, due_ms)
        except InferqError as error:
            return Failed(slot, ticket, _bare(error))
        return Opened(slot, ticket, inputs, references, outputs)

    def _other_task(
        self, slot: Slot, envelope: codec.Envelope, message: bytes
    ) -> Failed | Foreign | ScheduledRequest:
        headers = envelope.headers
        try:
            if self._foreign is None:
                raise not_registered(headers.task)
            queue = queue_of(self._advert.name)
            handed = self._foreign.message(message, envelope, queue, slot.claim.step)
            if headers.expires is not None:
                unix_ms("expires", headers.expires)
            if headers.eta is not None:
                due_ms = unix_ms("eta", headers.eta)
                if due_ms > self._redis_ms():
                    return ScheduledRequest(slot, message, due_ms)
        except InferqError as error:
            return Failed(slot, self._other_ticket(slot, envelope, message), _bare(error))
        return Foreign(slot, message, handed)

    def _other_ticket(self, slot: Slot, envelope: codec.Envelope, message: bytes) -> Ticket:
        """The ticket of a foreign task that is not run: who is answered, which tasks follow it."""
        ticket = replace(self._ticket(slot, envelope), task=envelope.headers.task)
        if ticket.reply is not None and not self._names.is_reply(ticket.reply):
            ticket = replace(ticket, reply=None)
        if envelope.headers.compression or len(envelope.body) > MAX_BYTES:
            return ticket
        try:
            body = codec.decode_body(envelope)
            if body.has_canvas:
                place_of(message)
                check_few(body.embed, len(message), self._links)
                ticket = replace(ticket, canvas=message)
        except InferqError:
            pass  # the tasks that follow it cannot be read
        return ticket

    def admit(
        self, opened: Opened, payloads: Mapping[str, bytes | memoryview | None]
    ) -> Waiting | Failed:
        """Read the tensors and check them against the signature. Never raises."""
        slot, ticket = opened.slot, opened.ticket
        try:
            arrays: dict[str, Array] = {}
            lists = False
            if self._text:
                self._check_text(opened, payloads)
            for name, tensor in opened.inputs.items():
                key = opened.references.get(name)
                if key is not None:
                    data = payloads.get(key)
                    if data is None:
                        raise PayloadExpired(
                            f"input {name!r}: its payload {key!r} is gone, or too large"
                        )
                    tensor = {**tensor, "data": data}  # noqa: PLW2901
                elif ticket.content_type == codec.JSON:
                    lists = lists or codec.is_lists(tensor)
                arrays[name] = codec.decode_tensor(name, tensor, self._dtypes.get(name))
            shared = None
            if self._adapts:
                arrays, shared, rows = self._adapted(arrays)
            else:
                rows = self._check(arrays)
            arrays, padded = self._padding.apply(arrays)
        except InferqError as error:
            return Failed(slot, ticket, _bare(error))
        except (KeyError, TypeError, ValueError, MemoryError) as problem:
            return Failed(slot, ticket, InvalidInput(f"inputs are no tensors: {problem!r}"))
        if lists:
            ticket = replace(ticket, lists=True)
        return Waiting(
            ticket=ticket,
            inputs=arrays,
            slot=slot,
            compatible=self._compatible(arrays, shared) if self._varies or shared else None,
            arrived_mono_ms=time.monotonic() * 1000,
            claimed_redis_ms=self._redis_ms(),
            rows=rows,
            alone=ticket.attempts > 0,
            padded=padded,
            shared=shared,
            outputs=opened.outputs,
        )

    def _check_text(
        self, opened: Opened, payloads: Mapping[str, bytes | memoryview | None]
    ) -> None:
        """PayloadTooLarge before an object is made of each element: these take far more memory."""
        size = 0
        for name in self._text:
            key = opened.references.get(name)
            tensor = opened.inputs[name]
            size += text_bytes(tensor, None if key is None else payloads.get(key))
        check_size(self._advert, size)

    def too_late(self, slot: Slot, ticket: Ticket) -> Failed | Revoked | None:
        """Whether its deadline or expiry has passed, or it was revoked; checked before it runs."""
        if ticket.deadline_ms is not None and self._redis_ms() > ticket.deadline_ms:
            late = self._redis_ms() - ticket.deadline_ms
            return Failed(
                slot, ticket, DeadlineExceeded(f"its timeout_ms passed {late:.0f} ms ago")
            )
        if ticket.expires_ms is not None and self._redis_ms() > ticket.expires_ms:
            return Revoked(slot, ticket, "expired")
        if self._is_revoked(ticket.id):
            return Revoked(slot, ticket, "revoked")
        return None

    def _too_large(self, slot: Slot, message: bytes, told: str) -> Failed | Quarantined:
        """The verdict on a message that is too large: only who sent it is read."""
        ticket = codec.guess_ticket(message, self._advert.name)
        if ticket is None:
            return Quarantined(slot, message, told)
        return Failed(slot, replace(ticket, priority=slot.claim.step), PayloadTooLarge(told))

    def _ticket(self, slot: Slot, envelope: codec.Envelope) -> Ticket:
        headers = envelope.headers
        extra: dict[str, Any] = {}
        if headers.group:
            extra["group_id"] = headers.group
        if headers.parent_id:
            extra["parent_id"] = headers.parent_id
        return Ticket(
            id=headers.id,
            model=self._advert.name,
            content_type=codec.MSGPACK if envelope.content_type == codec.MSGPACK else codec.JSON,
            priority=slot.claim.step,
            reply=headers.inferq_reply,
            sent_ms=headers.inferq_sent_ms,
            deadline_ms=headers.inferq_deadline_ms,
            ignore_result=bool(headers.ignore_result),
            extra=extra,
            kwargsrepr=(headers.kwargsrepr or "")[:MAX_REPR_CHARS],
            root_id=headers.root_id,
            eta=headers.eta,
        )

    def _inputs(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        unknown = sorted(given.keys() - _ARGUMENTS)
        if unknown:
            raise InvalidInput(f"argument {unknown[0][:100]!r}; expected inputs, model and outputs")
        model, inputs = given.get("model"), given.get("inputs")
        if model is not None and model != self._advert.name:
            told = (model if isinstance(model, str) else codec.brief(model))[:100]
            raise ModelNotFound(
                f"model {told!r} is not served from this queue; expected {self._advert.name!r}",
                model=told,
            )
        if not isinstance(inputs, dict) or not all(map(_is_str, inputs)):
            raise InvalidInput(
                f"inputs are {type(inputs).__name__}; expected a mapping of input names to tensors"
            )
        if inputs.keys() != self._required:
            check_names(self._advert, inputs)
        return inputs

    def _adapted(
        self, arrays: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array] | None, int]:
        """Checked inputs of the model's dtypes with rows in dim 0, optional ones, and the rows."""
        if self._advert.casts:
            arrays = cast_safely(self._advert, arrays)
        rows = self._check(arrays)
        given = self._optional & arrays.keys()
        shared = {name: arrays.pop(name) for name in given} if given else None
        return moved(arrays, self._axes), shared, rows

    def _compatible(
        self, arrays: Mapping[str, Array], shared: Mapping[str, Array] | None
    ) -> Hashable:
        shapes = tuple(arrays[name].shape[1:] for name in self._order) if self._varies else None
        if shared is None:
            return shapes
        given = ((name, array.shape, array.tobytes()) for name, array in shared.items())
        return shapes, tuple(sorted(given))


def _bare(error: InferqError) -> InferqError:
    """The same error without its traceback, whose frames hold all that was decoded.

    Frames and errors refer to each other, so only a garbage collection would free that memory.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
