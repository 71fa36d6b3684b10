"""A check's finding, and the time limit of checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    #: Requests are served, but something may be lost or slow.
    WARNING = "warning"
    #: Requests are not served, or not for long.
    ERROR = "error"


class Finding(msgspec.Struct, frozen=True):
    """One line of the report. `todo`: what to do about it; empty: nothing."""

    check: str
    level: Level
    found: str
    todo: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, Level.OK, found)


def warning(check: str, found: str, todo: str) -> Finding:
    return Finding(check, Level.WARNING, found, todo)


def error(check: str, found: str, todo: str) -> Finding:
    return Finding(check, Level.ERROR, found, todo)


def within(seconds: float, check: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What `look` finds.

    If it takes longer than `seconds`: an error finding; `look` is abandoned.
    """
    found: list[Finding] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            found.extend(look())
        except BaseException as problem:  # noqa: BLE001 - raised below
            problems.append(problem)

    thread = threading.Thread(target=run, name=f"doctor-{check}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [error(check, f"no answer within {seconds:g} s", "see what it waits for")]
    if problems:
        raise problems[0]
    return found
