"""Estimates from msgpack's bytes, before they are decoded, how much memory the objects take.

One byte of msgpack may be a list or a map, for which Python takes 56 to 220 bytes; numbers and
strings take at most 20 bytes for each of their own. So lists and maps are counted where they may be
too many: a regular expression skips runs of numbers, and strings and bytes are skipped by their
lengths. JSON needs no count: nothing in it takes more than 40 bytes for each of its own.
"""

from __future__ import annotations

import re
import struct
from typing import Final

#: Lists and maps that any message may hold; a message of fewer bytes is not checked.
FREE: Final = 65_536
#: One more is allowed for so many bytes: a row of one float takes 10.
BYTES_EACH: Final = 8

#: All bytes that are not the code of a list or a map.
_NO_CONTAINERS: Final = bytes({*range(256)} - {*range(0x80, 0xA0), *range(0xDC, 0xE0)})
#: A number, None, True or False, or those of one byte or eight one after another.
_NUMBER: Final = (
    rb"(?:[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]{1,1000}+|(?:\xcb.{8}){1,1000}+"
    rb"|[\xcc\xd0].|[\xcd\xd1]..|[\xca\xce\xd2].{4}|[\xcf\xd3].{8})"
)
_SOME: Final = re.compile(_NUMBER + rb"{1,8}+", re.DOTALL)
_MANY: Final = re.compile(_NUMBER + rb"{1,1000}+", re.DOTALL)
#: Steps of the first count, which uses `_SOME`.
_FEW_STEPS: Final = 512
#: Codes of lists and maps, and of strings, bytes and extensions: how their length is written.
_CONTAINERS: Final = {0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
_STRINGS: Final = {
    0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xC4: ">B", 0xC5: ">H", 0xC6: ">I",
    0xC7: ">B", 0xC8: ">H", 0xC9: ">I",
}  # fmt: skip
#: Extensions, which have one more byte for their type; and those of a fixed length.
_EXTENSIONS: Final = frozenset({0xC7, 0xC8, 0xC9})
_FIXED: Final = {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
_LENGTHS: Final = {form: struct.Struct(form) for form in (">B", ">H", ">I")}


def too_heavy(data: bytes) -> bool:
    """Whether msgpack holds more lists and maps than its bytes allow.

    Bytes that are no msgpack are judged as far as they can be read; the decoder refuses the rest.
    """
    if len(data) <= FREE:
        return False
    allowed = FREE + len(data) // BYTES_EACH
    # Tensors as bytes are skipped in a few steps. In tensors as lists, mostly fewer bytes can be
    # codes of lists than would be too many: counting those bytes is quicker than following the
    # lists.
    count = _count(data, allowed, _FEW_STEPS, _SOME)
    if count is None and len(data.translate(None, _NO_CONTAINERS)) > allowed:
        count = _count(data, allowed, len(data), _MANY)
    return count is not None and count > allowed


def _count(  # noqa: C901 - a branch for each form of msgpack, in a loop over bytes
    data: bytes, most: int, steps: int, numbers: re.Pattern[bytes]
) -> int | None:
    """How many lists and maps there are, or `most` + 1. None: not known after so many `steps`."""
    at, count = 0, 0
    end = len(data)
    for _ in range(steps):
        if at >= end or count > most:
            return count
        code = data[at]
        if code <= 0x7F or code >= 0xE0 or code in (0xC0, 0xC2, 0xC3) or 0xCA <= code <= 0xD3:
            run = numbers.match(data, at)
            if run is None:  # cut off
                return count
            at = run.end()
        elif code <= 0x9F:
            count += 1
            at += 1
        elif code <= 0xBF:
            at += 1 + code - 0xA0
        elif (form := _CONTAINERS.get(code)) is not None:
            count += 1
            at += 1 + _LENGTHS[form].size
        elif (form := _STRINGS.get(code)) is not None:
            size = _LENGTHS[form]
            if at + 1 + size.size > end:
                return count
            at += 1 + size.size + size.unpack_from(data, at + 1)[0] + (code in _EXTENSIONS)
        elif code in _FIXED:
            at += 1 + _FIXED[code]
        else:  # 0xC1, which is never used
            return count
    return None
