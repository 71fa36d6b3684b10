"""Hop 1. Turns arrays into the commands that push them. No I/O.

A small request is one message; consecutive ones for one queue share a variadic LPUSH. A tensor of
`INLINE_LIMIT` bytes or more is claim-checked: its bytes are stored under a key of their own, set in
the same MULTI that pushes the message. The message carries the key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from inferq.shared import codec
from inferq.shared.errors import InvalidInput, RedisUnavailable
from inferq.shared.names import Names, queue_of
from inferq.shared.resp import Command, Reply, ReplyError
from inferq.shared.schema import Array

#: A tensor of so many bytes or more is claim-checked. Measured (CPU µs a request of producer,
#: worker and Redis together, tensors echoed; inline/claim-checked): 16 KB 264/253, 32 KB 333/396,
#: 64 KB 507/480, 150 KB 1050/940, 300 KB 2000/1570, 600 KB 4600/3750.
INLINE_LIMIT: Final = 64 * 1024
#: Most requests that are pushed in one round trip.
PUSH_BLOCK: Final = 32
#: Seconds that a claim-checked tensor is kept beyond its request's deadline.
PAYLOAD_MARGIN_S: Final = 24 * 3600
#: Seconds that it is kept if the request has no deadline: it may wait that long for a worker.
PAYLOAD_TTL_S: Final = 7 * 24 * 3600

#: Ids made at once.
_IDS: Final = 256

_NO_TEXT: Final[Mapping[str, str]] = {}

Inputs = Mapping[str, npt.ArrayLike]


class Outgoing(msgspec.Struct, frozen=True, eq=False):
    """One encoded request: what is pushed, and pushed again if Redis loses it."""

    request_id: str
    model: str
    #: The Redis list it goes to.
    queue: str
    message: bytes
    #: Claim-checked tensors: key and bytes.
    payloads: tuple[tuple[str, bytes], ...]
    payload_ttl_s: int

    @property
    def nbytes(self) -> int:
        """Bytes that pushing it sends."""
        return len(self.message) + sum(len(data) for _, data in self.payloads)


def arrays_of(
    dtypes: Mapping[str, np.dtype[Any]], inputs: Inputs, text: Mapping[str, str] = _NO_TEXT
) -> dict[str, Array]:
    """`inputs` as arrays that can be sent; `dtypes` are the model's, by input name.

    `text`: which of them are ``string`` or ``bytes``. An array keeps its dtype. Lists and Python
    numbers have none, so they take the model's, if that holds what they say. InvalidInput names
    what cannot be sent.
    """
    if not isinstance(inputs, Mapping):
        raise InvalidInput(f"inputs {type(inputs).__name__}; expected a mapping of name to array")
    arrays: dict[str, Array] = {}
    for name, value in inputs.items():
        dtype = dtypes.get(name)
        if type(value) is np.ndarray and value.dtype == dtype and value.flags.c_contiguous:
            arrays[name] = value
        elif name in text:
            arrays[name] = codec.text_array(name, value, text[name])
        elif dtype is not None and isinstance(value, list | tuple):
            arrays[name] = codec.decode_tensor(name, list(value), dtype.name)
        elif dtype is not None and isinstance(value, int | float | complex):
            arrays[name] = codec.decode_tensor(name, [value], dtype.name)[0, ...]
        else:
            arrays[name] = codec.wire_array(name, value)
    return arrays


class _Ids:
    """Makes random UUIDs (version 4) as text, several times cheaper than `uuid.uuid4`."""

    def __init__(self) -> None:
        self._random: Iterator[str] = iter(())

    def new(self) -> str:
        digits = next(self._random, "")
        if not digits:
            pool = os.urandom(16 * _IDS).hex()
            self._random = iter([pool[i : i + 32] for i in range(0, 32 * _IDS, 32)])
            digits = next(self._random)
        variant = "89ab"[int(digits[16], 16) & 3]
        return (
            f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
        )


class Encoder:
    """Builds the messages of one model for one client."""

    def __init__(self, model: str, names: Names, client: str, origin: str) -> None:
        self._model = model
        self._names = names
        self._encode = codec.RequestEncoder(queue_of(model), origin, names.reply(client)).encode
        self._queues = [names.queue(model, priority) for priority in range(10)]
        self._ids = _Ids()
        self._shown: dict[tuple[tuple[int, ...], ...], str] = {}

    def encode(
        self,
        arrays: Mapping[str, Array],
        priority: int,
        sent_ms: float,
        deadline_ms: float | None,
        outputs: Sequence[str] | None = None,
    ) -> Outgoing:
        """One request; `arrays` have passed `check_inputs`, the times are Redis milliseconds."""
        request_id = self._ids.new()
        payloads: list[tuple[str, bytes]] = []
        tensors: dict[str, Mapping[str, Any]] = {}
        for name, array in arrays.items():
            if array.nbytes < INLINE_LIMIT:
                tensor = tensors[name] = codec.encode_tensor(array)
                # Of text only what was written says how many bytes it is.
                if not array.dtype.hasobject or len(tensor["data"]) < INLINE_LIMIT:
                    continue
                data = tensor["data"]
            else:
                # A copy: the caller may write to the array again, and this may be pushed again.
                data = codec.pack_text(array) if array.dtype.hasobject else array.tobytes()
            key = self._names.payload(request_id, name)
            tensors[name] = codec.encode_reference(array, key, len(data))
            payloads.append((key, data))
        message = self._encode(
            request_id,
            self._model,
            tensors,
            shown=self._describe(arrays),
            priority=priority,
            sent_ms=sent_ms,
            deadline_ms=deadline_ms,
            outputs=outputs,
        )
        ttl = PAYLOAD_TTL_S
        if deadline_ms is not None:
            ttl = PAYLOAD_MARGIN_S + max(0, int((deadline_ms - sent_ms) / 1000))
        queue = self._queues[priority]
        return Outgoing(request_id, self._model, queue, message, tuple(payloads), ttl)

    def _describe(self, arrays: Mapping[str, Array]) -> str:
        # dtypes and names are the signature's; only shapes vary, and rarely.
        shapes = tuple([array.shape for array in arrays.values()])
        shown = self._shown.get(shapes)
        if shown is None:
            if len(self._shown) > 1_000:
                self._shown.clear()
            shown = self._shown[shapes] = codec.shown(self._model, arrays)
        return shown


@dataclass(slots=True)
class Push:
    """Commands that push some requests in order, and which reply belongs to which request."""

    commands: list[Command] = field(default_factory=list)
    #: (index of the deciding reply, ids of the requests that it decides).
    _deciding: list[tuple[int, list[str]]] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Iterable[Outgoing]) -> Push:
        """The commands for `requests`; consecutive ones for one queue share an LPUSH."""
        push = cls()
        run: list[Outgoing] = []
        for request in requests:
            if run and (request.payloads or request.queue != run[0].queue):
                push._add_run(run)
                run = []
            if request.payloads:
                push._add_claim_checked(request)
            else:
                run.append(request)
        if run:
            push._add_run(run)
        return push

    def _add_run(self, run: list[Outgoing]) -> None:
        self._deciding.append((len(self.commands), [request.request_id for request in run]))
        self.commands.append(("LPUSH", run[0].queue, *[request.message for request in run]))

    def _add_claim_checked(self, request: Outgoing) -> None:
        ttl = request.payload_ttl_s
        self.commands.append(("MULTI",))
        self.commands += [("SET", key, data, "EX", ttl) for key, data in request.payloads]
        self.commands.append(("LPUSH", request.queue, request.message))
        self._deciding.append((len(self.commands), [request.request_id]))
        self.commands.append(("EXEC",))

    def refused(self, replies: Sequence[Reply]) -> dict[str, RedisUnavailable]:
        """The requests that Redis refused (it is full, or read-only), each with its reason."""
        found: dict[str, RedisUnavailable] = {}
        for index, ids in self._deciding:
            reply = replies[index]
            inner = reply if isinstance(reply, list) else [reply]
            problem = next((one for one in inner if isinstance(one, ReplyError)), None)
            if problem is not None:
                error = RedisUnavailable(f"Redis refused the push: {problem}")
                found.update(dict.fromkeys(ids, error))
        return found
