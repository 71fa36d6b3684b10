"""The torch engine as it is shipped, two lanes, warmed up five times, each in a new process.

Each process loads the model, warms it up as a worker does, then both lanes run at once and every
row is compared with what PyTorch answers on the CPU: ``python -m gpu.quick.warmups FOLDER``. In a
dry run the lanes are the CPU's, too, and it is done once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpu.quick.driver import is_fake, patient
from gpu.quick.report import CannotRun, Report

TIMES: Final = 5
LANES: Final = 2
_CHILD_S: Final = 25
_TOLERANCE: Final = 2e-2
_TOML: Final = """engine = "torch"
max_batch_size = 32
lanes = 2
[torch]
device = "{device}"
"""


def run(report: Report) -> None:
    """Five times. SystemExit: one of them failed."""
    where = torch_device()
    import torch  # noqa: PLC0415 - it was looked for just now
    from helpers import torch_models  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="inferq-quick-") as name:
        root = Path(name)
        torch.manual_seed(0)
        torch_models.save(
            root / "digits" / "1" / "model.pt2",
            torch_models.Digits().eval(),
            (torch.zeros(torch_models.ROWS, 1, 8, 8),),
            {"image": torch_models.batch()},
        )
        (root / "digits" / "model.toml").write_text(_TOML.format(device=where))
        warmed: list[dict[str, Any]] = []
        times = 1 if is_fake() else TIMES
        for _ in range(times):
            warmed.append(_once(root))
            report.add(warmed=warmed)
    well = [each for each in warmed if each["status"] == 0 and not each.get("wrong_rows")]
    seconds = ", ".join(f"{each.get('seconds', 0):.1f}" for each in warmed)
    report.say(f"{len(well)} of {times} were well; seconds {seconds}")
    if len(well) < times:
        raise SystemExit(next(each["said"] for each in warmed if each not in well))


def torch_device() -> str:
    """cuda; in a dry run, cpu. CannotRun: PyTorch is not there, or has no card."""
    try:
        import torch  # noqa: PLC0415
    except ImportError as problem:
        raise CannotRun(f"PyTorch is not there: {problem}") from None
    if is_fake():
        return "cpu"
    if not torch.cuda.is_available():
        raise CannotRun("PyTorch finds no card")
    return "cuda"


def _once(root: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpu.quick.warmups", str(root)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patient(_CHILD_S, is_fake())
        )
    except subprocess.TimeoutExpired:
        return {"status": None, "said": f"not ended within {_CHILD_S} s"}
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    said = (done.stdout + done.stderr).strip()[-1500:]
    return {"status": done.returncode, "said": said, **(told[-1] if told else {})}


def child(root: Path) -> None:
    """Load, warm up, run, compare; prints one line."""
    import logging  # noqa: PLC0415

    from inferq.workers.cuda.lane import CudaLane  # noqa: PLC0415
    from inferq.workers.models.engine import Batch  # noqa: PLC0415
    from inferq.workers.models.lane_threads import LaneThreads  # noqa: PLC0415
    from inferq.workers.models.registry import engine_class  # noqa: PLC0415
    from inferq.workers.models.repository import load_model  # noqa: PLC0415
    from inferq.workers.warmup.prepare import Preparation  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO)
    spec = load_model(root, "digits")
    began = time.monotonic()
    preparation = Preparation(spec)
    preparation.start()
    model = engine_class("torch")(spec).load()
    threads = LaneThreads(spec.name)
    prepared = preparation.prepare(model, threads)
    seconds = time.monotonic() - began

    import torch  # noqa: PLC0415

    program = torch.export.load(spec.path).module()
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 16, (64, 1, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        wanted = program(torch.from_numpy(images))["logits"].numpy()
    wrong = [0] * len(prepared.lanes)

    def drive(n: int) -> None:
        for turn in range(60):
            rows = (1, 3, 8, 32)[turn % 4]
            at = (7 * turn) % (len(images) - rows)
            parts = [{"image": images[at + i : at + i + 1]} for i in range(rows)]
            bucket = next((size for size in model.buckets if size >= rows), rows)
            got = prepared.lanes[n].run(Batch(parts, rows, bucket))["logits"]
            apart = np.abs(got - wanted[at : at + rows]).max(axis=1)
            wrong[n] += int((apart > _TOLERANCE * np.abs(wanted).max()).sum())

    threads.each(prepared.lanes, drive)
    tuning = prepared.tuning.seconds if prepared.tuning is not None else {}
    told = {
        "seconds": seconds,
        "lanes": len(prepared.lanes),
        "wrong_rows": sum(wrong),
        "batch_ms": {rows: taken * 1000 for rows, taken in tuning.items()},
        "graphs": [lane._graphs.on for lane in prepared.lanes if isinstance(lane, CudaLane)],
    }
    model.close()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    child(Path(sys.argv[1]))
