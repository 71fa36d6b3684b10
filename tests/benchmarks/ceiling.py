"""What ONNX Runtime itself can do with a model on this machine: the ceiling that a server has.

`python -m benchmarks.ceiling MODEL SECONDS LAYOUT BATCH` measures one way to run a model, alone in
a process of its own, and prints rows/s. `sweep` tries them all and `measure_ceiling` measures one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from inferq.shared.schema import Array

CORES = len(os.sched_getaffinity(0))
BATCHES = (1, 2, 4, 8, 16, 32)
#: Name → (sessions, calling threads, intra-op threads of each session).
LAYOUTS = {
    "one-session": (1, 1, CORES),
    "shared-session": (1, CORES, 1),
    "session-per-core": (CORES, CORES, 1),
}
TIMEOUT_S = 120.0
_NUMPY = {"tensor(int32)": np.int32, "tensor(uint8)": np.uint8, "tensor(float)": np.float32}


@dataclass(frozen=True)
class Way:
    """One way to run a model: a name from LAYOUTS and rows per call."""

    layout: str
    batch: int

    def __str__(self) -> str:
        return f"{self.layout}, batch {self.batch}"


def measure_ceiling(model: Path, way: Way, seconds: float) -> float:
    """Rows/s of the ONNX file `model` run this way, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.ceiling", str(model), str(seconds)]
    done = subprocess.run(
        [*command, way.layout, str(way.batch)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{model} ({way}): {done.stderr[-2000:]}")
    return float(done.stdout)


def sweep(model: Path, seconds: float, batches: Sequence[int] = BATCHES) -> list[Way]:
    """All ways to run `model`, the fastest first."""
    ways = [Way(layout, batch) for layout in LAYOUTS for batch in batches]
    return sorted(ways, key=lambda way: -measure_ceiling(model, way, seconds))


def example_rows(model: Path, rows: int) -> dict[str, Array]:
    """Inputs of the model's own dtype and shape, with `rows` in dim 0; the same every time."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for spec in session.get_inputs():
        shape = (rows, *spec.shape[1:])
        inputs[spec.name] = random.integers(0, 256, shape).astype(_NUMPY[spec.type])
    return inputs


def _session(model: Path, intra: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra
    options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(model: Path, seconds: float, way: Way) -> float:
    sessions, callers, intra = LAYOUTS[way.layout]
    opened = [_session(model, intra) for _ in range(sessions)]
    inputs = example_rows(model, way.batch)
    for session in opened:
        session.run(None, inputs)
    rows = [0] * callers
    gate = threading.Barrier(callers + 1)
    stop = threading.Event()

    def call(caller: int) -> None:
        session = opened[caller % sessions]
        gate.wait()
        while not stop.is_set():
            session.run(None, inputs)
            rows[caller] += way.batch

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(rows) / (time.perf_counter() - began)


if __name__ == "__main__":
    _model, _seconds, _layout, _batch = sys.argv[1:]
    print(_run(Path(_model), float(_seconds), Way(_layout, int(_batch))))
