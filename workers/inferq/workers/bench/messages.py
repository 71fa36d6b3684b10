"""The messages between the command and its producer processes: msgpack, preceded by the length."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import IO, Final, TypeVar

import msgspec
import numpy as np

from inferq.shared.codec import pack_text, unpack_text
from inferq.shared.schema import Array, is_text
from inferq.shared.text import dtype_name
from inferq.workers.bench.loads import Load
from inferq.workers.bench.tally import Ended, Tally

#: Bytes of one message.
MAX_BYTES: Final = 2**31
_LENGTH: Final = struct.Struct(">Q")

T = TypeVar("T")


class Tensor(msgspec.Struct, frozen=True):
    """An array."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message to a process."""

    redis_url: str
    model: str
    #: Requests' inputs, sent in turn.
    items: list[dict[str, Tensor]]
    #: This process' number, and how many there are.
    share: int
    shares: int
    priority: int | None
    timeout_ms: float | None


class Step(msgspec.Struct, frozen=True, tag=True):
    """Begin to send. Times of `time.monotonic`, which all processes of a machine share."""

    load: Load
    begins_at: float
    warmup_s: float
    window_s: float
    #: Seconds to wait for answers once a trace has ended.
    drain_s: float
    #: Of this process; for a rate or a trace.
    max_in_flight: int
    seed: int
    #: The step's number.
    number: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Send no more, and wait up to `drain_s` for answers. A later one may shorten the wait."""

    drain_s: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process has set itself up."""


class Window(msgspec.Struct, frozen=True, tag=True):
    """What ended in window `number`; -1 is the warm-up."""

    number: int
    ended: Ended


class Done(msgspec.Struct, frozen=True, tag=True):
    """The step is over. `tallies`: window → what was due in it (a trace: 0 for all of it)."""

    tallies: dict[int, Tally]
    #: When the last answer came.
    last_at: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The step cannot go on; the process ends."""

    message: str


ToProcess = Setup | Step | Stop
FromProcess = Ready | Window | Done | Failed
_to_process: Final = msgspec.msgpack.Decoder(ToProcess)
_from_process: Final = msgspec.msgpack.Decoder(FromProcess)


def write(stream: IO[bytes], message: ToProcess | FromProcess) -> None:
    """Write one message and flush. OSError if nobody reads any more."""
    data = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_order(stream: IO[bytes]) -> ToProcess | None:
    """In a process: the next message; None at the end."""
    return _read(stream, _to_process)


def read_report(stream: IO[bytes]) -> FromProcess | None:
    """In the command: a process' next message; None at the end, or if it is none."""
    try:
        return _read(stream, _from_process)
    except (msgspec.MsgspecError, OSError):
        return None


def _read(stream: IO[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_BYTES:
        return None
    data = stream.read(length)
    return decoder.decode(data) if len(data) == length else None


def packed(items: Sequence[Mapping[str, Array]]) -> list[dict[str, Tensor]]:
    """Arrays as they are sent."""
    return [{name: _packed(array) for name, array in one.items()} for one in items]


def _packed(array: Array) -> Tensor:
    if array.dtype.hasobject:
        return Tensor(dtype_name(array), array.shape, pack_text(array))
    return Tensor(array.dtype.str, array.shape, array.tobytes())


def unpacked(items: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Array]]:
    """What `packed` made, read-only."""
    return [{name: _unpacked(tensor) for name, tensor in one.items()} for one in items]


def _unpacked(tensor: Tensor) -> Array:
    if is_text(tensor.dtype):
        return unpack_text(tensor.dtype, tensor.data, tensor.shape)
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)
