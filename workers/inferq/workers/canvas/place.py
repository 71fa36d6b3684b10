"""Where a request stands in a canvas, as its headers say: its id becomes part of a chord's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from inferq.shared.errors import InvalidInput
from inferq.workers.canvas.options import check_count, check_group_id, check_id


class _Place(msgspec.Struct):
    id: str
    group: str | None = None
    group_index: int | None = None
    root_id: str | None = None
    parent_id: str | None = None


class _Placed(msgspec.Struct):
    headers: _Place


_decoder = msgspec.json.Decoder(_Placed)


def place_of(message: bytes) -> Mapping[str, Any]:
    """Those headers of a message. InvalidInput if one is not what Celery writes there."""
    try:
        place = _decoder.decode(message).headers
    except msgspec.DecodeError as problem:
        raise InvalidInput(f"where it stands in a canvas cannot be read: {problem}") from problem
    checked = (
        ("group", place.group or None, check_group_id),
        ("group_index", place.group_index, check_count),
        ("root_id", place.root_id, check_id),
        ("parent_id", place.parent_id, check_id),
    )
    for name, value, check in checked:
        try:
            if value is not None:
                check(value)
        except InvalidInput as problem:
            raise InvalidInput(f"header {name} {problem.message}") from None
    return msgspec.structs.asdict(place)
