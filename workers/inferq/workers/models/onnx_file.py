"""Checks an ONNX file for what an unfinished copy lacks, without reading its weights.

ONNX is protobuf: a message is a sequence of fields, each a number, a wire type and a value, and
messages nest. A field whose value ends beyond its message was cut off. The walk reads the graph and
everything that may hold constants, whose data may be in other files. Sources:
protobuf.dev/programming-guides/encoding, onnx/onnx.proto.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import BinaryIO, Final

#: Most fields that are read; the engine judges larger files alone. Five million take about 5 s.
MAX_FIELDS: Final = 5_000_000
MAX_ENTRY_BYTES: Final = 1 << 16
_CHUNK: Final = 1 << 16
_MAX_VARINT_BYTES: Final = 10
_EXTERNAL: Final = 1


class _Kind(Enum):
    MODEL = auto()
    GRAPH = auto()
    NODE = auto()
    ATTRIBUTE = auto()
    FUNCTION = auto()
    SPARSE = auto()
    TENSOR = auto()


_GRAPH_FIELD: Final = 7
_EXTERNAL_DATA_FIELD: Final = 13
_DATA_LOCATION_FIELD: Final = 14
#: Kind of message → field number → kind of the message in it. Other fields are skipped.
_INNER: Final[Mapping[_Kind, Mapping[int, _Kind]]] = {
    _Kind.MODEL: {_GRAPH_FIELD: _Kind.GRAPH, 25: _Kind.FUNCTION},
    _Kind.GRAPH: {1: _Kind.NODE, 5: _Kind.TENSOR, 15: _Kind.SPARSE},
    _Kind.NODE: {5: _Kind.ATTRIBUTE},
    _Kind.ATTRIBUTE: {
        5: _Kind.TENSOR, 6: _Kind.GRAPH, 10: _Kind.TENSOR, 11: _Kind.GRAPH,
        22: _Kind.SPARSE, 23: _Kind.SPARSE,
    },
    _Kind.FUNCTION: {7: _Kind.NODE, 11: _Kind.ATTRIBUTE},
    _Kind.SPARSE: {1: _Kind.TENSOR, 2: _Kind.TENSOR},
    _Kind.TENSOR: {},
}  # fmt: skip


class Malformed(Exception):
    """It is no ONNX file, or not a complete one; the text says why."""


@dataclass(frozen=True)
class External:
    """The place of a constant's data: in the file `location`, beside the model's."""

    location: str
    offset: int
    #: Bytes; None: the file does not say.
    length: int | None


def external_data(path: Path) -> list[External]:
    """The data that the ONNX file `path` keeps in other files. Raises Malformed, OSError."""
    with path.open("rb") as file:
        return _Walk(file).external()


class _Walk:
    """One walk through a file. The file may grow or shrink meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._chunk = b""
        #: Where `_chunk` begins in the file.
        self._begin = 0
        self._found: list[External] = []

    def external(self) -> list[External]:  # noqa: C901, PLR0912 - a branch for each wire type
        """The external data; of a file with too many fields, those found so far."""
        ahead = [(_Kind.MODEL, 0, self._size)]
        fields, has_graph = 0, False
        while ahead:
            kind, place, end = ahead.pop()
            inner = _INNER[kind]
            children: list[tuple[_Kind, int, int]] = []
            entries: dict[str, str] = {}
            is_external = False
            while place < end:
                fields += 1
                if fields > MAX_FIELDS:
                    return self._found
                began = place
                tag, place = self._varint(place)
                number, wire = tag >> 3, tag & 7
                if wire == 0 and number:
                    value, place = self._varint(place)
                    if number == _DATA_LOCATION_FIELD and kind is _Kind.TENSOR:
                        is_external = value == _EXTERNAL
                elif wire == 2 and number:
                    length, place = self._varint(place)
                    after = place + length
                    if after > end:
                        self._refuse(kind, began, after)
                    if number in inner:
                        children.append((inner[number], place, after))
                        has_graph |= kind is _Kind.MODEL and number == _GRAPH_FIELD
                    elif kind is _Kind.TENSOR and number == _EXTERNAL_DATA_FIELD:
                        entries.update(self._entry(place, after))
                    place = after
                elif wire in (1, 5) and number:
                    place += 8 if wire == 1 else 4
                else:
                    raise Malformed(f"nothing of ONNX stands at byte {began}")
                if place > end:
                    self._refuse(kind, began, place)
            ahead += reversed(children)  # in the file's order, in which it is read
            if is_external and "location" in entries:
                self._found.append(_external(entries))
        if not has_graph:
            raise Malformed("it holds no graph")
        return self._found

    def _refuse(self, kind: _Kind, began: int, after: int) -> None:
        if kind is _Kind.MODEL:
            raise Malformed(f"it has {self._size} bytes and goes on to byte {after}")
        raise Malformed(f"nothing of ONNX stands at byte {began}")

    def _varint(self, place: int) -> tuple[int, int]:
        """The number at `place`, and where it ends."""
        at = place - self._begin
        if not 0 <= at <= len(self._chunk) - _MAX_VARINT_BYTES:
            self._file.seek(place)
            self._chunk, self._begin, at = self._file.read(_CHUNK), place, 0
        elif (first := self._chunk[at]) < 0x80:
            return first, place + 1
        value = shift = 0
        for byte in self._chunk[at : at + _MAX_VARINT_BYTES]:
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place
            shift += 7
        if place >= self._size:
            raise Malformed(f"it has {self._size} bytes and goes on")
        raise Malformed(f"nothing of ONNX stands at byte {place}")

    def _entry(self, place: int, end: int) -> dict[str, str]:
        """The key and the value of a StringStringEntryProto."""
        if end - place > MAX_ENTRY_BYTES:
            raise Malformed(f"nothing of ONNX stands at byte {place}")
        texts = {1: "", 2: ""}
        while place < end:
            tag, place = self._varint(place)
            length, place = self._varint(place)
            if tag & 7 != 2 or place + length > end:
                raise Malformed(f"nothing of ONNX stands at byte {place}")
            self._file.seek(place)
            texts[tag >> 3] = self._file.read(length).decode(errors="replace")
            place += length
        return {texts[1]: texts[2]}


def _external(entries: Mapping[str, str]) -> External:
    offset, length = entries.get("offset", "0"), entries.get("length")
    try:
        return External(entries["location"], int(offset), None if length is None else int(length))
    except ValueError:
        raise Malformed(f"data in {entries['location']!r} has no whole offset or length") from None
