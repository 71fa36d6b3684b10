"""What a worker and the process of a lane tell each other: msgpack over a socket.

    worker → process    Describe | Load | Run
    process → worker    Described | Loaded | Answered | Failed

One message, one answer. The worker's side alone decides when the process ends.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from inferq.shared.schema import Signature
from inferq.workers.user_code.tensors import Place

#: Of one message. Tensors are not in it.
MAX_BYTES: Final = 32 << 20
_LENGTH: Final = struct.Struct("<I")
_CHUNK: Final = 1 << 16


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Import model.py and say what its class declares."""

    path: str
    #: What its lines of logging begin with.
    mark: str


class Load(msgspec.Struct, frozen=True, tag=True):
    """Import model.py and load its class."""

    path: str
    mark: str
    device: str
    config: Mapping[str, Any]
    #: Bytes of an answer.
    most: int
    #: Of logging.
    level: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """Run one batch, whose inputs stand in the memory of `size` bytes."""

    inputs: tuple[Place, ...]
    size: int
    #: None: the model is not batchable.
    rows: int | None
    requests: int


class Described(msgspec.Struct, frozen=True, tag=True):
    signature: Signature


class Loaded(msgspec.Struct, frozen=True, tag=True):
    signature: Signature


class Answered(msgspec.Struct, frozen=True, tag=True):
    """The outputs stand in the memory of `size` bytes; none if all rows have errors."""

    outputs: tuple[Place, ...]
    size: int
    #: Row → message and code of its RequestError.
    errors: Mapping[int, tuple[str, str]] = {}


class Failed(msgspec.Struct, frozen=True, tag=True):
    """What was asked for could not be done. The process goes on.

    `kind`: ``raised`` by the code, ``memory`` if it was MemoryError; ``rows``, another number of
    them than the inputs have; ``answer`` that does not fit otherwise; ``request``, a RequestError
    for all of the batch.
    """

    message: str
    #: Of a RequestError.
    code: str = ""
    kind: Literal["raised", "memory", "rows", "answer", "request"] = "raised"
    trace: str = ""


Asked = Describe | Load | Run
Told = Described | Loaded | Answered | Failed
Message = TypeVar("Message")


class Gone(Exception):
    """The other side has closed the socket."""


class Channel(Generic[Message]):
    """One end of the socket, on which messages of the type `kind` arrive."""

    def __init__(self, connection: socket.socket, kind: Any) -> None:
        self.connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kind)
        self._received = bytearray()

    def send(self, message: msgspec.Struct) -> None:
        """OSError; ValueError: it is too large."""
        body = self._encoder.encode(message)
        if len(body) > MAX_BYTES:
            raise ValueError(f"a message of {len(body)} bytes; expected at most {MAX_BYTES}")
        self.connection.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> Message:
        """The next message, waited for as long as the socket's timeout says. Gone, OSError."""
        while (message := self._whole()) is None:
            chunk = self.connection.recv(_CHUNK)
            if not chunk:
                raise Gone
            self._received += chunk
        return message

    def _whole(self) -> Message | None:
        received = self._received
        if len(received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(received)
        if length > MAX_BYTES:
            raise Gone
        end = _LENGTH.size + length
        if len(received) < end:
            return None
        body = bytes(received[_LENGTH.size : end])
        del received[:end]
        return self._decoder.decode(body)
