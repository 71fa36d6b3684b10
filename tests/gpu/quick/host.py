"""Pinning, the cores near the card, telemetry: what the worker asks of NVML and of the kernel."""

from __future__ import annotations

import os
import time
from statistics import median

from gpu.quick.driver import Driver, is_fake
from gpu.quick.kernels import kernels
from gpu.quick.report import CannotRun, Report
from inferq.shared.errors import ConfigError
from inferq.shared.settings import Settings
from inferq.workers.cuda.gpus import gpu_at
from inferq.workers.cuda.pinning import environment_of, pin
from inferq.workers.cuda.telemetry import FRESH_S, GpuTelemetry


def run(report: Report) -> None:
    """As a worker does it: pinned before anything looks for devices, then CUDA, then telemetry."""
    try:
        gpu = gpu_at(0)
    except ConfigError as problem:
        raise CannotRun(str(problem)) from None
    report.add(uuid=gpu.uuid, environment=environment_of(gpu), near=sorted(gpu.cores))
    before = os.sched_getaffinity(0)
    pin(Settings.load(redis_url="redis://127.0.0.1", gpu=0))
    bound = os.sched_getaffinity(0)
    report.add(cores_before=len(before), cores_bound_to=len(bound))
    report.say(f"pinned: {len(bound)} of {len(before)} cores, {len(gpu.cores)} are near the card")
    telemetry = GpuTelemetry(0)
    try:
        report.add(idle=telemetry.numbers(), info={k: str(v) for k, v in telemetry.info().items()})
        _busy(report, telemetry)
    finally:
        telemetry.close()


def _busy(report: Report, telemetry: GpuTelemetry) -> None:
    """While a kernel runs, and how long the driver takes to tell."""
    if is_fake():
        report.say("the fake driver does not know the fake NVML's cards: nothing runs on one")
        return
    driver = Driver()
    driver.open()
    stream = driver.stream()
    made = kernels(driver)
    for _ in range(15):
        made.busy(stream, 0, 0, 0, 0, 200_000.0)
    time.sleep(FRESH_S * 0.9)
    taken = []
    for _ in range(2):
        time.sleep(FRESH_S)
        began = time.perf_counter()
        telemetry.read()
        taken.append((time.perf_counter() - began) * 1000)
    numbers = telemetry.numbers()
    report.add(busy=numbers, reading_ms=median(taken))
    driver.check("cuStreamSynchronize", stream)
    report.say(f"telemetry: {', '.join(f'{name} {n:g}' for name, n in numbers.items())}")
