"""What a step tells, written down as it goes; and how it says that it cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

#: The exit status of a step that cannot run here; its file says why.
CANNOT_RUN: Final = 3


class CannotRun(Exception):
    """This step cannot run here; the reason."""


class Report:
    """What a step has found out so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def add(self, **found: Any) -> None:
        """Further figures, by name; they are written down at once."""
        self._found.update(_rounded(found))
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._found))
        new.replace(self._path)

    def say(self, text: str) -> None:
        """What the table shows of it, a line at a time."""
        self.add(said=[*self._found.get("said", []), text])
        print(text, flush=True)


def _rounded(value: Any) -> Any:
    """With five digits, all through it."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
