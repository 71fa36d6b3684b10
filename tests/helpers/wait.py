"""Waiting for conditions, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.005


def until(predicate: Callable[[], T], timeout: float = 15.0, what: str | None = None) -> T:
    """Call `predicate` until what it returns is true, and return that.

    AssertionError after `timeout` seconds, naming `what` and the last value.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            name = what or getattr(predicate, "__name__", "condition")
            raise AssertionError(f"not within {timeout:g} s: {name} (last: {value!r})")
        time.sleep(_POLL_S)
    return value
