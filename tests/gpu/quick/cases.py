"""The cases of helpers.cuda_cases on a card, each in a process: ``python -m gpu.quick.cases NAME``.

A kernel doubles in place of the double of TensorRT's context, and another one ends the context
where a case wants that. What only the fake driver can do, to answer one call with an error or to
keep a simulated time, ends a case here, and it is named; what only it can count is not looked at.
On the fake driver some of them run as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_void_p
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from gpu.quick.driver import Driver, is_fake, patient
from gpu.quick.kernels import ENDINGS, kernels
from gpu.quick.report import CANNOT_RUN, Report

HELPERS: Final = Path(__file__).parents[2] / "helpers"
#: Not on a card, and why.
NOT_ON_A_CARD: Final = {
    "memory_that_is_short_at_the_start_is_said": "pins as much memory as the card has",
}
#: A dry run's; tests/unit/cuda/test_lane.py runs all of them on the fake driver.
DRY: Final = ("every_request_gets_its_rows", "results_stay_as_they_were")
_CASE_S: Final = 20
_AT_ONCE: Final = 4


class NeedsFake(BaseException):
    """Only the fake driver does that. No Exception: nobody is to judge it."""


class _Uncounted:
    """A count that nobody has: compared with anything it is as it is expected to be."""

    def __bool__(self) -> bool:
        return False

    def _agrees(self, _other: object) -> bool:
        return True

    def _stays(self, _other: object) -> _Uncounted:
        return self

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _agrees
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _stays
    __hash__ = None  # type: ignore[assignment]


class NoControl:
    """In place of the fake driver's Control."""

    def count(self, _name: str) -> Any:
        return _Uncounted()

    def set(self, name: str, _value: float) -> None:
        raise NeedsFake(f"sets {name}")

    def fail(self, code: int) -> None:
        """As the fake does, but by a kernel."""
        how = next((how for how, answer in ENDINGS.items() if answer == code), None)
        if how is None:
            raise NeedsFake(f"asks for error {code}")
        driver = Driver()
        driver.check("cuCtxPushCurrent_v2", driver.made("cuDevicePrimaryCtxRetain", 0))
        stream = driver.stream()
        kernels().end(stream, how)
        driver.call("cuStreamSynchronize", stream)
        driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise NeedsFake(f"asks it to {name}")

        return refuse


def names() -> list[str]:
    """All cases, in order."""
    source = (HELPERS / "cuda_cases.py").read_text()
    return re.findall(r"^def ([a-z]\w*)\(\) -> None", source, re.MULTILINE)


def run(report: Report) -> None:
    """All of them, some at once."""
    passed: list[str] = []
    skipped, failed = dict[str, str](), dict[str, str]()
    todo = list(DRY) if is_fake() else [name for name in names() if name not in NOT_ON_A_CARD]
    skipped.update(dict.fromkeys(names(), "not in a dry run") if is_fake() else NOT_ON_A_CARD)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, (status, said) in zip(todo, pool.map(_run, todo), strict=True):
            skipped.pop(name, None)
            if status == 0:
                passed.append(name)
            elif status == CANNOT_RUN:
                skipped[name] = said.splitlines()[-1]
            else:
                failed[name] = said[-600:]
            report.add(passed=passed, skipped=skipped, failed=failed)
    report.say(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} were not run here")
    for name in failed:
        report.say(f"failed: {name}")
    if failed:
        raise SystemExit(f"{len(failed)} cases failed")


def command(name: str) -> list[str]:
    """Runs one case."""
    return [sys.executable, "-m", "gpu.quick.cases", name]


def _run(name: str) -> tuple[int | None, str]:
    try:
        done = subprocess.run(
            command(name), capture_output=True, text=True, timeout=patient(_CASE_S, is_fake())
        )
    except subprocess.TimeoutExpired:
        return None, f"not ended within {_CASE_S} s"
    return done.returncode, (done.stdout + done.stderr).strip()


def loaded() -> ModuleType:
    """helpers.cuda_cases; on a card with a kernel in its double, and without the fake's Control."""
    from helpers.fakecuda import control  # noqa: PLC0415

    if is_fake():
        from helpers import cuda_cases  # noqa: PLC0415

        return cuda_cases
    control.Control = NoControl  # type: ignore[misc, assignment]
    from helpers import cuda_cases  # noqa: PLC0415

    doubler: Any = cuda_cases.Doubler
    told = doubler.set_shapes

    def set_shapes(self: Any, shapes: Any) -> Any:
        kernels()  # compiled now: it cannot be while a graph is captured
        return told(self, shapes)

    def enqueue(self: Any, stream: int) -> None:
        rows, width = self.shapes["x"]
        if self.fails_above is not None and rows > self.fails_above[0]:
            raise self.fails_above[1]
        if self.us > 0:
            kernels().busy(stream, 0, 0, 0, 0, self.us)
        x, k, y = (self.addresses[name] for name in ("x", "k", "y"))
        kernels().twice(stream, x, k, y, rows, width)

    doubler.set_shapes, doubler.enqueue = set_shapes, enqueue
    return cuda_cases


def main(name: str) -> int:
    """One case."""
    try:
        getattr(loaded(), name)()
    except NeedsFake as reason:
        print(reason)
        return CANNOT_RUN
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
