"""Requests for the model echo."""

from __future__ import annotations

import numpy as np

from inferq.shared.names import Names
from inferq.shared.schema import Array

QUEUE = Names().queue("echo")
#: Seconds within which whoever asks a client that is closed has an answer.
SOON_S = 10.0


def x(n: float = 0.0) -> dict[str, Array]:
    return {"x": np.full((1, 4), n, np.float32)}
