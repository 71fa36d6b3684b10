"""What copies, launches and waiting cost: by size, way, and by how the host waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from ctypes import byref, c_void_p
from statistics import median
from typing import Any, Final

from gpu.quick.busy import WIDTH
from gpu.quick.driver import BLOCKING_SYNC, MODES, Driver
from gpu.quick.kernels import kernels
from gpu.quick.report import Report

SIZES: Final = {
    "4 KB": 4096,
    "1 picture": WIDTH,
    "32 pictures": 32 * WIDTH,
    "128 pictures": 128 * WIDTH,
}
_ROUNDS: Final = 15
_KERNELS_US: Final = (100.0, 1000.0)


def run(report: Report) -> None:
    """All of it."""
    driver = Driver()
    driver.open()
    kernels(driver)
    largest = max(SIZES.values())
    began = time.perf_counter()
    pinned = driver.made("cuMemAllocHost_v2", largest)
    allocated = time.perf_counter() - began
    back = driver.made("cuMemAllocHost_v2", largest)
    device, other = (driver.made("cuMemAlloc_v2", largest) for _ in range(2))
    stream, second = driver.stream(), driver.stream()
    report.add(pinned_alloc_ms_per_100_mb=allocated * 1000 / largest * 1e8)

    def h2d(size: int) -> None:
        driver.check("cuMemcpyHtoDAsync_v2", device, pinned, size, stream)

    def d2h(size: int, on: int = stream) -> None:
        driver.check("cuMemcpyDtoHAsync_v2", back, other, size, on)

    def both() -> None:
        h2d(largest)
        d2h(largest, second)
        driver.check("cuStreamSynchronize", stream)
        driver.check("cuStreamSynchronize", second)

    copies: dict[str, dict[str, float]] = {}
    for name, size in SIZES.items():
        copies[name] = {
            f"{way.__name__}_gb_s": _rate(driver, stream, size, way) for way in (h2d, d2h)
        }
        report.add(copies=copies)
        told = ", ".join(f"{way[:3]} {rate:.1f} GB/s" for way, rate in copies[name].items())
        report.say(f"{name}: {told}")
    seconds = _median_s(both)
    report.add(both_ways_gb_s=2 * largest / seconds / 1e9)
    report.add(host_us=_host_us(driver, stream, device, pinned))
    _waiting(report, driver, stream)


def _rate(driver: Driver, stream: int, size: int, copy: Callable[[int], None]) -> float:
    """GB/s by the card's clock, of ten copies in a row."""
    began, ended = driver.event(), driver.event()
    rates = []
    for _ in range(_ROUNDS):
        driver.check("cuEventRecord", began, stream)
        for _ in range(10):
            copy(size)
        driver.check("cuEventRecord", ended, stream)
        driver.check("cuStreamSynchronize", stream)
        rates.append(10 * size / max(1e-6, driver.ms_between(began, ended)) / 1e6)
    driver.check("cuEventDestroy_v2", began)
    driver.check("cuEventDestroy_v2", ended)
    return median(rates)


def _host_us(driver: Driver, stream: int, device: int, pinned: int) -> dict[str, float]:
    """What the host pays to submit, without waiting; and one small copy with the wait for it."""
    event = driver.event(BLOCKING_SYNC)
    driver.check("cuStreamBeginCapture_v2", stream, MODES["thread_local"])
    for _ in range(3):
        kernels().busy(stream, 0, 0, 0, 0, 1.0)
    graph = c_void_p()
    driver.check("cuStreamEndCapture", stream, byref(graph))
    executable = driver.made("cuGraphInstantiateWithFlags", graph, 0)
    calls: dict[str, Callable[[], object]] = {
        "kernel": lambda: kernels().busy(stream, 0, 0, 0, 0, 1.0),
        "copy of 4 KB": lambda: driver.check("cuMemcpyHtoDAsync_v2", device, pinned, 4096, stream),
        "record of an event": lambda: driver.check("cuEventRecord", event, stream),
        "graph of three kernels": lambda: driver.check("cuGraphLaunch", executable, stream),
    }
    found = {}
    for name, call in calls.items():
        taken = []
        for _ in range(_ROUNDS):
            driver.check("cuStreamSynchronize", stream)
            began = time.perf_counter()
            for _ in range(20):
                call()
            taken.append((time.perf_counter() - began) / 20 * 1e6)
        found[name] = median(taken)

    def round_trip() -> None:
        driver.check("cuMemcpyHtoDAsync_v2", device, pinned, 4096, stream)
        driver.check("cuStreamSynchronize", stream)

    found["copy of 4 KB, waited for"] = _median_s(round_trip) * 1e6
    return found


def _waiting(report: Report, driver: Driver, stream: int) -> None:
    """From the kernel's end until the thread goes on, and CPU taken, as events wait."""
    found: dict[str, dict[str, Any]] = {}
    for us in _KERNELS_US:
        for name, flags in (("spinning", 0), ("blocking", BLOCKING_SYNC)):
            began, ended = driver.event(), driver.event(flags)
            late, cpu = [], []
            for _ in range(4 * _ROUNDS):
                cpu_before, before = time.thread_time(), time.perf_counter()
                driver.check("cuEventRecord", began, stream)
                kernels().busy(stream, 0, 0, 0, 0, us)
                driver.check("cuEventRecord", ended, stream)
                driver.check("cuEventSynchronize", ended)
                wall = time.perf_counter() - before
                cpu.append((time.thread_time() - cpu_before) * 1e6)
                late.append(wall * 1e6 - driver.ms_between(began, ended) * 1000)
            found[f"{us:g} us, {name}"] = {
                "beyond_the_kernel_us": median(late),
                "beyond_the_kernel_p90_us": sorted(late)[int(0.9 * len(late))],
                "cpu_us": median(cpu),
            }
            report.add(waiting=found)
    told = (f"{name} {each['beyond_the_kernel_us']:.0f} us" for name, each in found.items())
    report.say(f"submitted and waited for, beyond the kernel: {', '.join(told)}")


def _median_s(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return median(taken)
