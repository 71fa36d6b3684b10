"""Input for magika: the files below a directory, to find the type of each."""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from inferq.producer.examples import magika
from inferq.producer.pending import Result
from inferq.shared.errors import InferqError
from inferq.shared.schema import Tensors
from inferq.workers.demo.models import MAGIKA

#: A walk stops after this many files: of a whole disk the first ones are enough.
MOST_FILES: Final = 200_000
_SEED: Final = 20


def find_files(root: Path, limit: int) -> list[Path]:
    """Up to `limit` regular files at or below `root`, picked evenly and always the same ones.

    Links are not followed. Files that cannot be read are left out.
    """
    if root.is_file():
        return [root]
    found: list[str] = []
    folders = [str(root)]
    while folders and len(found) < MOST_FILES:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        found.append(entry.path)
        except OSError:
            continue
    found.sort()
    if len(found) > limit:
        found = sorted(random.Random(_SEED).sample(found, limit))
    return [Path(path) for path in found]


class Files:
    """Requests from `paths`, and the types found."""

    model = MAGIKA

    def __init__(self, paths: Sequence[Path], labels: Sequence[str]) -> None:
        self._paths = paths
        self._labels = labels
        #: The heads of the files that were asked about, oldest first.
        self._asked: deque[bytes] = deque()
        self.types: Counter[str] = Counter()
        #: Files too short to be worth asking about: their type is known without the model.
        self.without_model = 0
        self.unreadable = 0
        self.answered = 0

    @property
    def total(self) -> int:
        return len(self._paths)

    @property
    def done(self) -> int:
        """Files that are answered, of `total`."""
        return self.answered + self.without_model + self.unreadable

    def requests(self) -> Iterator[Tensors]:
        for path in self._paths:
            try:
                head, tail = magika.read_ends(path)
            except OSError:
                self.unreadable += 1
                continue
            request = magika.tokens(head, tail)
            if request is None:
                self.types[magika.without_model(head)] += 1
                self.without_model += 1
                continue
            self._asked.append(head)
            yield {"bytes": request}

    def take(self, outcome: Result | InferqError) -> None:
        """Take the outcome of the oldest request without one."""
        head = self._asked.popleft()
        self.answered += 1
        if isinstance(outcome, Result):
            scores = outcome.outputs["target_label"][0]
            self.types[magika.answer(scores, self._labels, head)] += 1
