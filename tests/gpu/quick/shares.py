"""How much of the card the lanes use: by kernel, batch and lanes.

The share is the time that the kernels of all batches take back to back, by the time that was needed
with gathering, copies, waiting and handing out. Rows are pictures of 150 KB; each batch's are
looked at.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Final

from gpu.quick.busy import busy_lane, pictures, wrong_rows
from gpu.quick.driver import is_fake
from gpu.quick.rates import WARM, measure
from gpu.quick.report import Report
from inferq.workers.cuda import device
from inferq.workers.cuda.graphs import Graphs
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.cuda.splitting import RowLimit

KERNELS_MS: Final = (0.45, 1.0, 3.0)
#: Rows of a batch, and whether a lane spins until its batch is done.
WAYS: Final = ((32, False), (32, True), (128, False))
LANES: Final = (1, 2, 3, 4)
#: Of one measurement.
_S: Final = 0.7
_ALONE: Final = 50


def run(report: Report) -> None:
    """All combinations. SystemExit: rows were mixed up."""
    gpu = device.acquire()
    found: list[dict[str, Any]] = []
    for kernel_ms, (rows, spin) in product(KERNELS_MS, WAYS):
        limit, graphs = RowLimit(), Graphs(on=True)
        lanes = [
            busy_lane(gpu, limit, us=kernel_ms * 1000, rows=rows, graphs=graphs, spin=spin)
            for _ in range(LANES[-1])
        ]
        for lane in lanes:
            for _ in range(WARM):
                lane.run(pictures(rows))
        alone_ms = lanes[0].repeat(pictures(rows), _ALONE)
        way = {"kernel_ms": kernel_ms, "rows": rows, "wait": "spin" if spin else "block"}
        for count in LANES:
            found.append({**way, "lanes": count, **_measured(lanes[:count], rows, alone_ms)})
            report.add(shares=found)
        for lane in lanes:
            lane.close()
        told = " ".join(f"{each['share']:.3f}" for each in found[-len(LANES) :])
        report.say(f"{kernel_ms} ms, batch {rows}, {way['wait']}, 1 to {LANES[-1]} lanes: {told}")
    if wrong := sum(each["wrong_rows"] for each in found):
        raise SystemExit(f"{wrong} rows were another row's")


def _measured(lanes: list[CudaLane], rows: int, alone_ms: float) -> dict[str, Any]:
    seconds = 0.1 if is_fake() else _S
    work = [pictures(rows, first=50 * n) for n in range(len(lanes))]
    wrong: list[int] = []
    rate = measure(lanes, work, seconds, lambda batch, got: wrong.append(wrong_rows(batch, got)))
    return {
        "share": rate.batches * alone_ms / 1000 / rate.wall_s,
        "alone_ms": alone_ms,
        "rows_per_s": rate.batches * rows / rate.wall_s,
        "cpu_us_per_row": rate.cpu_s / (rate.batches * rows) * 1e6,
        "gather_ms": work[0].gather_ms,
        "batches": rate.batches,
        "wrong_rows": sum(wrong),
    }
