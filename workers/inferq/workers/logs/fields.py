"""The fields of a log line beside its text (`extra=`), which JSON lines contain."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, Final

#: Most request ids in one line; `requests` counts all of them if there are more.
MAX_IDS: Final = 32

#: The fields of a JSON line, in order, after time, level, logger, message and node.
FIELDS: Final = (
    "model", "lane", "rows", "requests", "padding", "bucket", "runs", "ms", "error", "incarnation",
    "request_ids", "failed_ids", "late_ids", "left_out",
)  # fmt: skip


def about(*request_ids: str | None, model: str | None = None, **others: object) -> dict[str, Any]:
    """`extra` for a line about these requests; None stands for one whose id nobody can read."""
    fields: dict[str, Any] = {"model": model, "request_ids": few(request_ids), **others}
    return {name: value for name, value in fields.items() if value not in (None, [])}


def few(ids: Iterable[str | None]) -> list[str]:
    """The first ids, so that a line stays short."""
    return list(islice((each for each in ids if each is not None), MAX_IDS))
