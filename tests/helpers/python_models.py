"""Models of user code for tests: a model.py in a repository."""

from __future__ import annotations

import textwrap
from pathlib import Path

#: What may be sent to `POISONED` in place of a number.
SEGFAULT, EXIT, LOOP, BOMB, RAISE, REFUSE, HANG_IN_C = range(-1, -8, -1)

#: Doubles its input, unless that is one of the above. It notes each load, and each run's rows.
POISONED = """
import ctypes, os, time
import numpy as np
from inferq.model import Model, RequestError

class Poisoned(Model):
    inputs = {"x": "float32[batch, 4]"}
    outputs = {"y": "float32[batch, 4]"}

    def load(self, context):
        self.bomb = []
        print(f"loaded in {os.getpid()}", flush=True)

    def run(self, inputs):
        x = inputs["x"]
        for first in x[:, 0]:
            if first == -1:
                ctypes.string_at(0)
            elif first == -2:
                os._exit(3)
            elif first == -3:
                while True:
                    pass
            elif first == -4:
                while True:
                    self.bomb.append(np.ones(1 << 22))
            elif first == -5:
                raise ValueError("five")
            elif first == -7:
                ctypes.PyDLL(None).pause()  # with the GIL
        if (x[:, 0] == -6).any():
            return [RequestError("six") if row[0] == -6 else {"y": row * 2} for row in x]
        return {"y": x * 2}
"""


def python_model(
    root: Path, name: str, code: str, *, knobs: str = "", table: str = "", version: int = 1
) -> Path:
    """A model of `code` in the repository `root`; its model.py.

    `knobs` and `table` are lines of its model.toml, before and in ``[python]``.
    """
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (root / name / "model.toml").write_text(f"{knobs}\n[python]\n{table}\n")
    path = folder / "model.py"
    path.write_text(textwrap.dedent(code))
    return path
