"""Cases of `make gpu`'s own report, each run as ``python -m helpers.make_gpu_cases NAME FOLDER``.

It is imported where a libcuda is only: here a fake one (see fakecuda). Lanes are stubs.
Each function without parameters is a case.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from gpu import run
from gpu.lanes import speed
from gpu.run import Ended, Report
from rich.console import Console

from helpers.repository import spec_of
from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.shared.schema import GpuTimes, Signature, TensorSpec
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.models.engine import Batch

FOLDER = Path(sys.argv[2])
OUT = FOLDER / "build" / "gpu.json"


class StubLane:
    """Takes 1 ms a batch, and fails in its thread after `fails_after` of them."""

    def __init__(self, fails_after: float = float("inf")) -> None:
        self.gpu_times = GpuTimes(h2d_ms=0.1, compute_ms=1.0, d2h_ms=0.1)
        self._left = fails_after
        self._main = threading.current_thread()

    def run(self, batch: Batch) -> dict[str, Any]:
        time.sleep(0.001)
        if threading.current_thread() is not self._main:
            self._left -= 1
            if self._left < 0:
                raise EngineError("on the GPU: an illegal address")
        return {}

    def repeat(self, batch: Batch, times: int) -> float:
        return 1.0


def _report() -> Report:
    return Report(Console(quiet=True), OUT, quick=True)


def _written() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OUT.read_bytes())
    return found


def _spec() -> Any:
    signature = Signature((TensorSpec("x", "float32", ("batch", 2)),), ())
    return replace(spec_of(None, {}, buckets=(4,)), signature=signature)


def figures_of_survivors_are_no_share() -> None:
    lanes = cast("list[CudaLane]", [StubLane(), StubLane(fails_after=5), StubLane()])
    with pytest.raises(EngineError, match="an illegal address"):
        speed(_spec(), lanes, 4, 0.1)
    found = speed(_spec(), cast("list[CudaLane]", [StubLane(), StubLane()]), 4, 0.1)
    assert found.rows_per_s > 0


def results_are_written_after_each_step() -> None:
    report = _report()
    for n in range(3):
        report.add("growth", {"n": n}, f"{n}")
        assert [row["n"] for row in _written()["growth"]] == list(range(n + 1))
    with report.step("bad"):
        raise ConfigError("not so")
    assert _written()["failed"] == ["bad: not so"]
    assert not list(OUT.parent.glob("*.new"))


def a_step_that_fails_is_a_failure_and_the_next_one_runs() -> None:
    report = _report()
    report.add("lanes", {}, "")
    assert report.status == 0
    for problem in (ConfigError("differs"), AssertionError(), RuntimeError("[red]")):
        with report.step("one"):
            raise problem
    assert report.status == 1
    assert len(report.found["failed"]) == 3
    with pytest.raises(Ended), report.step("two"):
        raise FatalEngineError("CUDA is beyond use")
    assert _written()["failed"][-1] == "two: CUDA is beyond use"


def a_run_that_measured_nothing_is_no_success() -> None:
    report = _report()
    report.found["not_run"]["tensorrt"] = "not installed"
    assert report.status == 1


def a_wrong_answer_of_the_torch_engine_is_a_failure() -> None:
    report = _report()
    patch = pytest.MonkeyPatch()

    def wrong(*_: Any) -> Any:
        raise ConfigError("torch.device is 'cuda', but no CUDA device could be used")

    patch.setattr(run, "open_session", wrong)
    patch.setattr(run, "load_model", lambda *_: _spec())
    report.on_torch(FOLDER)
    assert report.found["not_run"] == {}
    assert len(report.found["failed"]) == 2 * len(run.WAYS)
    assert report.status == 1


if __name__ == "__main__":
    globals()[sys.argv[1]]()
