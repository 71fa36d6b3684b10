"""Which calls break the capture of a CUDA graph, made by another thread or by the same one.

For each mode of capturing: a stream captures, a call is made, the capture is ended. What the call
answers and what the end answers are told, as numbers (900 to 908 are CUDA's errors of capturing).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_void_p
from dataclasses import dataclass, field
from typing import Final

from gpu.quick.driver import BLOCKING_SYNC, MODES, Driver
from gpu.quick.kernels import PTX, kernels
from gpu.quick.report import Report

_SIZE: Final = 4096
Call = Callable[[], int]


@dataclass
class _Stage:
    """What the calls are made with."""

    driver: Driver
    captured: int
    other: int
    #: Recorded on the other stream, long ago; and within the capture.
    past: int
    within: int
    device: int
    pinned: int
    graph: int = 0
    #: Freed after the capture: what the calls made.
    made: list[tuple[str, int]] = field(default_factory=list)

    def keep(self, free: str, make: str, *given: object) -> int:
        into = c_void_p()
        answer = self.driver.call(make, byref(into), *given)
        if not answer:
            self.made.append((free, into.value or 0))
        return answer

    def drop(self) -> None:
        for free, handle in self.made:
            self.driver.call(free, handle)
        self.made.clear()

    def captures_too(self) -> int:
        """Another stream captures meanwhile."""
        mode, into = MODES["thread_local"], c_void_p()
        answer = self.driver.call("cuStreamBeginCapture_v2", self.other, mode)
        if answer:
            return answer
        self.driver.call("cuMemsetD8Async", self.device, 2, _SIZE, self.other)
        answer = self.driver.call("cuStreamEndCapture", self.other, byref(into))
        if into.value:
            self.made.append(("cuGraphDestroy", into.value))
        return answer


def run(report: Report) -> None:
    """All modes, calls and threads."""
    driver = Driver()
    context = driver.open()
    kernels(driver)
    stage = _Stage(
        driver,
        driver.stream(),
        driver.stream(),
        driver.event(),
        driver.event(BLOCKING_SYNC),
        driver.made("cuMemAlloc_v2", 2 * _SIZE),
        driver.made("cuMemAllocHost_v2", _SIZE),
    )
    driver.check("cuEventRecord", stage.past, stage.other)
    driver.check("cuStreamSynchronize", stage.other)
    stage.graph = _other_graph(stage)
    calls = {**_calls(stage), **_torch_calls()}
    table: dict[str, dict[str, dict[str, str]]] = {}
    another = ThreadPoolExecutor(1)
    another.submit(driver.check, "cuCtxSetCurrent", context).result()
    for mode in MODES:
        for who in ("another", "same"):
            rows = table.setdefault(mode, {}).setdefault(who, {})
            for name, call in calls.items():
                thread = another if who == "another" else None
                rows[name] = _one(stage, MODES[mode], name, call, thread)
                report.add(answers=table)
    for mode in MODES:
        broken = [name for name, told in table[mode]["another"].items() if not told.endswith("/0")]
        report.say(f"{mode}: broken by another thread's {', '.join(broken) or 'none of them'}")


def _one(stage: _Stage, mode: int, name: str, call: Call, thread: ThreadPoolExecutor | None) -> str:
    """As "answer of the call/answer of the capture's end"."""
    driver = stage.driver
    if name == "cuMemFree":
        stage.keep("cuMemFree_v2", "cuMemAlloc_v2", _SIZE)
    if name == "cuMemFreeHost":
        stage.keep("cuMemFreeHost", "cuMemAllocHost_v2", _SIZE)
    driver.check("cuStreamBeginCapture_v2", stage.captured, mode)
    driver.call("cuMemsetD8Async", stage.device, 1, _SIZE, stage.captured)
    driver.call("cuEventRecord", stage.within, stage.captured)
    try:
        answer = str(call() if thread is None else thread.submit(call).result(10))
    except TimeoutError:
        raise TimeoutError(f"{name} has not returned within 10 s") from None
    except Exception as problem:  # noqa: BLE001 - PyTorch's, told by its first words
        answer = str(problem).splitlines()[0][:80] or type(problem).__name__
    driver.call("cuMemsetD8Async", stage.device, 3, _SIZE, stage.captured)
    graph, executable = c_void_p(), c_void_p()
    ended = driver.call("cuStreamEndCapture", stage.captured, byref(graph))
    if graph.value:
        ended = ended or driver.call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        driver.call("cuGraphDestroy", graph)
    if executable.value:
        driver.call("cuGraphExecDestroy", executable)
    stage.drop()
    if driver.call("cuStreamSynchronize", stage.other):  # its own capture went wrong
        stage.other = driver.stream()
    driver.check("cuStreamSynchronize", stage.captured)
    return f"{answer}/{ended}"


def _calls(stage: _Stage) -> dict[str, Call]:
    driver, call, host = stage.driver, stage.driver.call, c_void_p(stage.pinned)
    device, captured = stage.device + _SIZE, stage.captured

    def free(name: str) -> int:
        function, handle = stage.made.pop()
        return driver.call(function, handle)

    calls: dict[str, Call] = {
        "nothing": lambda: 0,
        "cuCtxSynchronize": lambda: call("cuCtxSynchronize"),
        "cuMemAlloc": lambda: stage.keep("cuMemFree_v2", "cuMemAlloc_v2", _SIZE),
        "cuMemFree": lambda: free("cuMemFree_v2"),
        "cuMemAllocHost": lambda: stage.keep("cuMemFreeHost", "cuMemAllocHost_v2", _SIZE),
        "cuMemFreeHost": lambda: free("cuMemFreeHost"),
        "cuMemGetInfo": lambda: (driver.memory(), 0)[1],
        "cuStreamCreate": lambda: stage.keep("cuStreamDestroy_v2", "cuStreamCreate", 1),
        "cuEventCreate": lambda: stage.keep("cuEventDestroy_v2", "cuEventCreate", 0),
        "cuEventQuery, other stream's": lambda: call("cuEventQuery", stage.past),
        "cuEventSynchronize, other stream's": lambda: call("cuEventSynchronize", stage.past),
        "cuEventQuery, captured": lambda: call("cuEventQuery", stage.within),
        "cuEventSynchronize, captured": lambda: call("cuEventSynchronize", stage.within),
        "cuStreamSynchronize, other": lambda: call("cuStreamSynchronize", stage.other),
        "cuStreamSynchronize, captured": lambda: call("cuStreamSynchronize", captured),
        "cuStreamQuery, captured": lambda: call("cuStreamQuery", captured),
        "cuMemcpyHtoDAsync, other": (
            lambda: call("cuMemcpyHtoDAsync_v2", device, host, _SIZE, stage.other)
        ),
        "cuMemcpyHtoD, legacy": lambda: call("cuMemcpyHtoD_v2", device, host, _SIZE),
        "cuMemsetD8Async, legacy": lambda: call("cuMemsetD8Async", device, 0, _SIZE, None),
        "cuStreamSynchronize, legacy": lambda: call("cuStreamSynchronize", None),
        "cuGraphLaunch, other": lambda: call("cuGraphLaunch", stage.graph, stage.other),
        "cuGraphUpload, other": lambda: call("cuGraphUpload", stage.graph, stage.other),
        "capture, other": stage.captures_too,
    }
    if not driver.fake:
        calls["cuModuleLoadData"] = lambda: stage.keep("cuModuleUnload", "cuModuleLoadData", PTX)
    return calls


def _torch_calls() -> dict[str, Call]:
    """Empty where PyTorch has no card."""
    try:
        import torch  # noqa: PLC0415
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    kept = torch.ones(8, device="cuda")

    def done(call: Callable[[], object]) -> Call:
        def called() -> int:
            call()
            return 0

        return called

    return {
        "torch.cuda.synchronize": done(torch.cuda.synchronize),
        "torch.empty, 64 MB": done(lambda: torch.empty(64 << 20, device="cuda")),
        "torch.cuda.empty_cache": done(torch.cuda.empty_cache),
        "torch, copied to the host": done(kept.cpu),
        "torch, a kernel": done(lambda: kept + 1),
    }


def _other_graph(stage: _Stage) -> int:
    driver = stage.driver
    driver.check("cuStreamBeginCapture_v2", stage.other, MODES["thread_local"])
    driver.check("cuMemsetD8Async", stage.device + _SIZE, 4, _SIZE, stage.other)
    graph = c_void_p()
    driver.check("cuStreamEndCapture", stage.other, byref(graph))
    executable = driver.made("cuGraphInstantiateWithFlags", graph, 0)
    driver.check("cuGraphDestroy", graph)
    return executable
