"""What the producers wrote down, read while they write."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Accepted:
    """Its submit returned. Times are monotonic seconds, which all processes share."""

    at: float
    producer: int
    number: int


@dataclass(frozen=True)
class Resolved:
    """What its producer was told, and the digest of what Redis had stored at `read_at`."""

    at: float
    outcome: str
    digest: str
    read_at: float
    #: The worker that computed it; empty if its result does not say.
    worker: str


@dataclass
class Ledger:
    """Every accepted request by its id."""

    accepted: dict[str, Accepted] = field(default_factory=dict)
    resolved: dict[str, Resolved] = field(default_factory=dict)
    #: Error class → submits that raised it.
    refused: Counter[str] = field(default_factory=Counter)
    #: What no submit may raise.
    troubles: list[str] = field(default_factory=list)

    def note(self, line: dict[str, Any]) -> None:
        """Take one line of a book; see `producer`."""
        match line["k"]:
            case "a":
                self.accepted[line["id"]] = Accepted(line["at"], line["p"], line["n"])
            case "r":
                self.resolved[line["id"]] = Resolved(
                    line["at"], line["o"], line["d"], line["read"], line["w"]
                )
            case "x":
                self.refused[line["w"]] += 1
            case _:
                self.troubles.append(f"submit raised {line['m']}")

    @property
    def unresolved(self) -> set[str]:
        """Accepted, and nothing came of it yet."""
        return self.accepted.keys() - self.resolved.keys()


class Books:
    """Reads on in the producers' books, whole lines only."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self._folder = folder
        self._ledger = ledger
        self._read: dict[Path, int] = {}

    def read(self) -> None:
        """Take what was written since."""
        for path in sorted(self._folder.glob("p*.jsonl")):
            with path.open("rb") as book:
                book.seek(self._read.get(path, 0))
                text = book.read()
            whole = text[: text.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self._ledger.note(json.loads(line))
            self._read[path] = self._read.get(path, 0) + len(whole)


def executions(folder: Path) -> Counter[tuple[int, int]]:
    """(producer, number) → how often an engine began it, as the workers' hook wrote it down."""
    counted: Counter[tuple[int, int]] = Counter()
    for path in folder.glob("*.runs"):
        for line in path.read_text().splitlines():
            producer, number = line.split()
            counted[int(producer), int(number)] += 1
    return counted
