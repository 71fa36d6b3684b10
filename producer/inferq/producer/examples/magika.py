"""What type is a file? Inputs and answers of `magika`, Google's file type model.

    head, tail = read_ends(path)
    request = tokens(head, tail)
    if request is None:
        print(without_model(head))
    else:
        scores = client.infer("magika", {"bytes": request}).outputs["target_label"][0]
        print(answer(scores, labels, head))

It does what the Python package magika 1.0.3 does (https://github.com/google/magika), `labels` being
the names in the model's model.toml.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

#: Bytes read at either end of a file, and how many of them the model sees.
BLOCK: Final = 4096
SEEN: Final = 1024
#: Stands where there is no byte.
PADDING: Final = 256
#: Fewer bytes than this, leading whitespace aside, are not worth asking about.
FEWEST: Final = 8

#: How sure the model must be of a type.
THRESHOLD: Final = 0.5
STRICTER: Final = {
    "crt": 0.9, "handlebars": 0.9, "ignorefile": 0.95, "latex": 0.95, "markdown": 0.75,
    "ocaml": 0.9, "pascal": 0.95, "r": 0.9, "rst": 0.9, "sql": 0.9, "tsv": 0.9, "zig": 0.9,
}  # fmt: skip
GENERIC: Final = {"randombytes": "unknown", "randomtxt": "txt"}


def read_ends(path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """The first and the last 4096 bytes of a file; they overlap if it is short."""
    with open(path, "rb") as file:
        head = file.read(BLOCK)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - BLOCK))
        return head, file.read(BLOCK)


def tokens(head: bytes, tail: bytes) -> npt.NDArray[np.int32] | None:
    """The model's input, int32 [1, 2048]; None: too few bytes, ask `without_model`.

    1024 bytes from the start and 1024 from the end, whitespace stripped at the outer sides; what is
    missing is filled up towards the middle.
    """
    first = head.lstrip()[:SEEN]
    last = tail.rstrip()[-SEEN:]
    if len(first) < FEWEST:
        return None
    row = np.full((1, 2 * SEEN), PADDING, np.int32)
    row[0, : len(first)] = np.frombuffer(first, np.uint8)
    row[0, 2 * SEEN - len(last) :] = np.frombuffer(last, np.uint8)
    return row


def without_model(head: bytes) -> str:
    """``empty``, ``txt`` or ``unknown``: for few bytes, and where the model is not sure."""
    if not head:
        return "empty"
    try:
        head.decode()
    except UnicodeDecodeError as problem:
        # A character that the end of the block cuts in two is no sign of binary data.
        cut = len(head) == BLOCK and problem.start > BLOCK - 4 and "end of data" in problem.reason
        return "txt" if cut else "unknown"
    return "txt"


def answer(scores: npt.NDArray[np.float32], labels: Sequence[str], head: bytes) -> str:
    """The type that float32 [214] `scores` stand for.

    Where the model is not sure enough, the package goes by whether its best guess is a text type;
    this goes by the bytes themselves.
    """
    best = int(scores.argmax())
    label = labels[best]
    if scores[best] < STRICTER.get(label, THRESHOLD):
        return without_model(head)
    return GENERIC.get(label, label)
