"""Reads a message's arguments, the keys of its payloads, and its times."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from inferq.shared import codec
from inferq.shared.errors import (
    InvalidInput,
)


def arguments(body: codec.Body) -> Mapping[str, Any]:
    """The arguments by name; the task is ``infer(inputs, model=None, *, outputs=None)``."""
    if not body.args:
        return body.kwargs
    if len(body.args) > 2:
        raise InvalidInput(f"{len(body.args)} arguments; expected inputs and model")
    return dict(zip(("inputs", "model"), body.args, strict=False)) | body.kwargs


def references_in(inputs: object) -> dict[str, str]:
    """Input name → payload key of the claim-checked tensors; `inputs` may be anything."""
    if not isinstance(inputs, dict):
        return {}
    found = ((name, codec.reference_of(tensor)) for name, tensor in inputs.items())
    return {name: key for name, key in found if key is not None}


def unix_ms(header: str, given: str) -> float:
    """The time in a header as ms since 1970. InvalidInput if it is no ISO 8601 time."""
    try:
        moment = datetime.fromisoformat(given)
    except ValueError:
        raise InvalidInput(f"{header} {given[:60]!r}; expected an ISO 8601 time") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000
