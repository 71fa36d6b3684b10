"""ResNet-50 on the torch engine, in half precision on a card, fed with pictures as uint8.

Its weights are random, scaled so that the answers of different pictures are far apart. Each row of
every lane is compared with what PyTorch answers on the CPU in single precision; rows in each
other's place would be found (see gpu.checks). A dry run has the CPU compute, of a few pictures.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from gpu.checks import Expected, choose, picture
from gpu.models import SIDE, served_resnet50
from gpu.quick.driver import is_fake
from gpu.quick.path import measure as measure_path
from gpu.quick.rates import WARM
from gpu.quick.rates import measure as measure_lanes
from gpu.quick.report import Report
from gpu.quick.warmups import torch_device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.models.engine import LoadedModel
from inferq.workers.models.registry import engine_class
from inferq.workers.models.repository import load_model
from inferq.workers.trt.verify import LIMITS

MODEL: Final = "resnet50"
BUCKETS: Final = (1, 8, 32)
LANES: Final = (1, 2, 3)
_S: Final = 2.0
_PRODUCERS_S: Final = 6.0
_TOML: Final = """engine = "torch"
max_batch_size = 32
buckets = [1, 8, 32]
batchable = true
lanes = {lanes}
[torch]
device = "{device}"
"""


def run(report: Report) -> None:
    """WrongAnswers: of a lane."""
    where = torch_device()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inferq-quick-") as name:
        root = Path(name)
        (root / MODEL / "1").mkdir(parents=True)
        (root / MODEL / "model.toml").write_text(
            _TOML.format(device=where, lanes=1 if is_fake() else LANES[-1])
        )
        rng = np.random.default_rng(0)
        count = 8 if is_fake() else 48
        rows = [{"image": picture(rng, SIDE)[None]} for _ in range(count)]
        half = where == "cuda"
        answers = _export(root / MODEL / "1" / "model.pt2", rows, half=half)
        expected = choose(MODEL, rows, answers, LIMITS["fp16" if half else "fp32"])
        report.add(half=half, told_apart=len(expected.rows), export_s=time.monotonic() - began)
        spec = load_model(root, MODEL)
        began = time.monotonic()
        model = engine_class("torch")(spec).load()
        report.add(load_s=time.monotonic() - began)
        try:
            _check(report, model, expected)
            if where == "cuda":
                _speed(report, model, expected)
                _memory(report)
        finally:
            model.close()
        if where == "cuda":
            measure_path(report, root, MODEL, None, _PRODUCERS_S, expected)


def _export(path: Path, rows: list[dict[str, Any]], *, half: bool) -> dict[str, Any]:
    """Write the program; what it answers to `rows` on the CPU, in single precision."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    module = served_resnet50()
    images = torch.from_numpy(np.concatenate([row["image"] for row in rows]))
    with torch.inference_mode():
        scores = module(images)["scores"].numpy()
    if half:
        module.half().to(memory_format=torch.channels_last)
    example = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    program = torch.export.export(
        module, (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
    )
    torch.export.save(program, path)
    return {"scores": scores}


def _check(report: Report, model: LoadedModel, expected: Expected) -> None:
    """Every lane at every bucket, padded and full, until it is a graph, and once more."""
    worst, checked = 0.0, 0
    buckets = BUCKETS[:2] if is_fake() else BUCKETS
    for lane in model.lanes:
        for bucket in buckets:
            for rows in sorted({bucket, max(1, bucket - 1)}):
                for turn in range(1 if is_fake() else WARM + 1):
                    batch, right = expected.batch(rows, bucket, seed=rows + turn)
                    worst = max(worst, expected.check(lane.run(batch), right))
                    checked += rows
    report.add(largest_error=worst, rows_checked=checked, lanes=len(model.lanes))
    report.say(f"{checked} rows checked, largest error {worst:.3g} of {expected.limit:g}")


def _speed(report: Report, model: LoadedModel, expected: Expected) -> None:
    rows = BUCKETS[-1]
    batch, _ = expected.batch(rows, rows, seed=1)
    lanes = cast("Sequence[CudaLane]", model.lanes)
    alone_ms = lanes[0].repeat(batch, 50)
    shares: list[dict[str, Any]] = []
    for count in LANES:
        work = [expected.batch(rows, rows, seed=n)[0] for n in range(count)]
        rate = measure_lanes(lanes[:count], work, _S)
        shares.append(
            {
                "lanes": count,
                "rows_per_s": rate.batches * rows / rate.wall_s,
                "share": rate.batches * alone_ms / 1000 / rate.wall_s,
                "cpu_us_per_row": rate.cpu_s / (rate.batches * rows) * 1e6,
            }
        )
        report.add(alone_ms=alone_ms, alone_rows_per_s=rows / alone_ms * 1000, shares=shares)
    told = " ".join(f"{each['share']:.3f}" for each in shares)
    report.say(f"batch {rows}: {rows / alone_ms * 1000:.0f} rows/s back to back")
    report.say(f"share of that with 1 to {LANES[-1]} lanes: {told}")


def _memory(report: Report) -> None:
    import torch  # noqa: PLC0415

    free, total = torch.cuda.mem_get_info()
    status = Path("/proc/self/status").read_text()
    (resident,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    found = {
        "gpu_mb": (total - free) / 1e6,
        "torch_reserved_mb": torch.cuda.memory_reserved() / 1e6,
        "host_mb": int(resident.split()[1]) / 1e3,
    }
    report.add(memory=found)
    report.say(f"memory: {', '.join(f'{name} {mb:.0f}' for name, mb in found.items())}")
