"""Keeps claimed requests whose payloads stay in Redis until there is room for them here.

A request's size is known only once it is claimed. If a claim is larger than the budget has room
for, its messages, which are small, are kept, and its payloads are fetched when other requests end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from inferq.shared.codec import MAX_MESSAGE_BYTES
from inferq.shared.codec.content import is_shape
from inferq.shared.schema import WIRE_DTYPES, is_text
from inferq.shared.text import HELD_EACH, OFFSET_BYTES
from inferq.workers.claims.verdicts import Opened


class Unfetched(msgspec.Struct, frozen=True, eq=False):
    """A request that was opened, and all its bytes, by what its message says."""

    opened: Opened
    size: int


def payload_sizes(opened: Opened, most: int = MAX_MESSAGE_BYTES) -> dict[str, int]:
    """Payload key → bytes, by the tensor's dtype and shape, of text by its size; 0 where these are
    none.

    All are 0 if they are more than `most` together, which no request may have. Such a request
    fails, and no other should wait until there is room for it.
    """
    sizes = {key: _declared(opened.inputs[name]) for name, key in opened.references.items()}
    return sizes if sum(sizes.values()) <= most else dict.fromkeys(sizes, 0)


def _declared(tensor: object) -> int:
    if not isinstance(tensor, dict):
        return 0
    shape, dtype = tensor.get("shape"), tensor.get("dtype")
    if isinstance(dtype, str) and is_text(dtype):
        size = tensor.get("size")
        return size if type(size) is int and size >= 0 else 0
    known = WIRE_DTYPES.get(dtype) if isinstance(dtype, str) else None
    # The product of a million numbers, which no shape has, takes minutes.
    if known is None or not is_shape(shape):
        return 0
    return math.prod(shape) * known.itemsize


def text_bytes(tensor: object, payload: bytes | memoryview | None) -> int:
    """Bytes of a tensor of text: its `payload`'s, or what it says that this has, or its data's.

    0 for lists, of whose elements objects were made already.
    """
    data = tensor.get("data") if isinstance(tensor, dict) else None
    if isinstance(data, dict):  # as kombu's JSON writes bytes: base64
        data = data.get("__value__")
        return len(data) * 3 // 4 if isinstance(data, str) else 0
    if isinstance(data, bytes):
        return len(data)
    return max(_declared(tensor), 0 if payload is None else len(payload))


def beside_payloads(opened: Opened) -> int:
    """About what the elements of claim-checked text take in memory besides their bytes."""
    count = 0
    for name in opened.references:
        tensor = opened.inputs[name]
        dtype, shape = tensor.get("dtype"), tensor.get("shape")
        if isinstance(dtype, str) and is_text(dtype) and is_shape(shape):
            # Each has an offset, so there cannot be more of them, whatever the shape says.
            count += min(math.prod(shape), _declared(tensor) // OFFSET_BYTES)
    return count * HELD_EACH


class Backlog:
    """One worker's unfetched requests, by model, most urgent first.

    Owned by the data plane's thread.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[Unfetched]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Unfetched]:
        return (each for some in self._waiting.values() for each in some)

    @property
    def models(self) -> list[str]:
        """The models whose requests wait."""
        return list(self._waiting)

    def add(self, model: str, some: Iterable[Unfetched]) -> None:
        """Put `some` behind those that are as urgent."""
        waiting = self._waiting.setdefault(model, [])
        waiting.extend(some)
        waiting.sort(key=lambda each: each.opened.ticket.priority)

    def first(self, model: str, room: int, *, alone: bool) -> Sequence[Unfetched]:
        """The first ones that fit into `room` bytes; at least one if it would be `alone`."""
        found: list[Unfetched] = []
        for each in self._waiting[model]:
            room -= each.size
            if room < 0 and (found or not alone):
                break
            found.append(each)
        return found

    def drop(self, model: str, count: int) -> None:
        """Remove the first `count`, which have been fetched."""
        left = self._waiting[model][count:]
        if left:
            self._waiting[model] = left
        else:
            del self._waiting[model]

    def clear(self) -> None:
        self._waiting.clear()
