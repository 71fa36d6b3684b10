"""What the driver answers after a kernel has ended the context, and whether the process can end.

Each way in a child process, which tells what it sees line by line; the parent's own context, on the
same card, has to go on meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from ctypes import byref, c_void_p
from itertools import product
from typing import Any, Final

from gpu.quick.driver import Driver, patient
from gpu.quick.kernels import ENDINGS, kernels
from gpu.quick.report import Report

#: What is asked first: the context is pushed and popped, as a lane does, or the stream is waited
#: for.
FIRST: Final = ("push", "synchronize")
_CHILD_S: Final = 7
_SETTLE_S: Final = 0.3


def run(report: Report) -> None:
    """All endings, and both ways to find out."""
    driver = Driver()
    driver.open()
    ours = driver.stream()
    kernels(driver)
    told: dict[str, Any] = {}
    for how, first in product(ENDINGS, FIRST):
        began = time.monotonic()
        command = [sys.executable, "-m", "gpu.quick.trap", how, first]
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, timeout=patient(_CHILD_S, driver.fake)
            )
            status, out = child.returncode, child.stdout
        except subprocess.TimeoutExpired as late:
            status, out = None, (late.stdout or b"").decode(errors="replace")
        answers = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
        kernels().busy(ours, 0, 0, 0, 0, 100.0)
        told[f"{how}, {first} first"] = {
            "answers": answers,
            "exit_status": status,
            "ended_after_s": round(time.monotonic() - began, 2),
            "answer_of_another_process": driver.call("cuStreamSynchronize", ours),
        }
        report.add(**told)
        shown = ", ".join(f"{name} {answer}" for name, answer, _ in answers[:8])
        report.say(f"{how}, {first} first: {shown} …; exit status {status}")


def child(how: str, first: str) -> None:
    """Ends its own context, then asks."""
    driver = Driver()
    context = driver.open()
    made = kernels(driver)
    stream, event = driver.stream(), driver.event()
    memory = driver.made("cuMemAlloc_v2", 4096)
    pinned = driver.made("cuMemAllocHost_v2", 4096)
    driver.check("cuCtxPopCurrent_v2", byref(c_void_p()))
    into = c_void_p()

    def ask(name: str, *given: object) -> None:
        began = time.perf_counter()
        answer = driver.call(name, *given)
        ms = round((time.perf_counter() - began) * 1000, 3)
        print(json.dumps([name, answer, ms]), flush=True)

    driver.check("cuCtxPushCurrent_v2", context)
    made.end(stream, how)
    driver.call("cuEventRecord", event, stream)
    if first == "push":
        time.sleep(_SETTLE_S)  # it has failed by then, and nobody has asked
        ask("cuCtxPopCurrent_v2", byref(into))
        ask("cuCtxPushCurrent_v2", context)
    for name, given in (
        ("cuEventSynchronize", (event,)),
        ("cuStreamSynchronize", (stream,)),
        ("cuCtxSynchronize", ()),
        ("cuCtxPopCurrent_v2", (byref(into),)),
        ("cuCtxPushCurrent_v2", (context,)),
        ("cuCtxGetCurrent", (byref(into),)),
        ("cuEventQuery", (event,)),
        ("cuMemAlloc_v2", (byref(into), 4096)),
        ("cuMemAllocHost_v2", (byref(into), 4096)),
        ("cuMemFree_v2", (memory,)),
        ("cuMemFreeHost", (pinned,)),
        ("cuEventDestroy_v2", (event,)),
        ("cuStreamDestroy_v2", (stream,)),
        ("cuDevicePrimaryCtxRelease_v2", (0,)),
        ("cuDevicePrimaryCtxReset_v2", (0,)),
        ("cuDevicePrimaryCtxRetain", (byref(into), 0)),
    ):
        ask(name, *given)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2])
