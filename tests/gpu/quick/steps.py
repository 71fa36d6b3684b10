"""The steps in their order, and how long each may take: 500 s together at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Step:
    """Also the name of its module."""

    name: str
    limit_s: int
    tells: str


STEPS: Final = (
    Step("machine", 10, "card, driver, PCIe link, cores and NUMA node, packages, tools"),
    Step("captures", 20, "which calls break the capture of a graph, by mode and thread"),
    Step("trap", 30, "what push, pop, free and the rest answer after a trap; other processes"),
    Step("copies", 20, "copies by size and way, launches, what waiting costs and how late it is"),
    Step("cases", 40, "the lane with a kernel, through the cases that the fake driver runs"),
    Step("sanitizer", 35, "the same under compute-sanitizer"),
    Step("warmups", 80, "the torch engine as shipped: two lanes, warm-up five times, rows checked"),
    Step("shares", 60, "how much of the card lanes use: kernels of 0.45, 1, 3 ms × batch × lanes"),
    Step("resnet", 110, "ResNet-50, fp16, uint8 pictures: share, rows checked, memory, producers"),
    Step("host", 15, "pinning, NUMA, telemetry"),
    Step("path", 35, "worker and Valkey with 1 and 3 producers; CPU of each row"),
    Step("sticky", 40, "a sticky error in a worker, and its successor"),
)
