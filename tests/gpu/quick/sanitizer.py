"""Some cases of lanes under compute-sanitizer, which watches each access to the card's memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from gpu.quick.cases import command
from gpu.quick.driver import is_fake
from gpu.quick.report import CANNOT_RUN, CannotRun, Report

#: Batches of all shapes with padding, graphs and eager; then shapes that come and go.
CASES: Final = ("every_request_gets_its_rows", "any_of_the_largest_shapes_has_room")
_CASE_S: Final = 16
_FOUND_SOMETHING: Final = 9


def run(report: Report) -> None:
    """memcheck on each."""
    if is_fake():
        raise CannotRun("the fake driver has no kernels to be watched")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise CannotRun("compute-sanitizer is not there")
    found: dict[str, str] = {}
    for name in CASES:
        watched = [tool, "--tool", "memcheck", "--error-exitcode", str(_FOUND_SOMETHING)]
        try:
            done = subprocess.run(
                [*watched, *command(name)], capture_output=True, text=True, timeout=_CASE_S
            )
        except subprocess.TimeoutExpired:
            found[name] = f"not ended within {_CASE_S} s"
            report.add(**found)
            continue
        said = (done.stdout + done.stderr).strip()
        if "Device not supported" in said:
            raise CannotRun("compute-sanitizer does not support this device, or its sandbox")
        outcome = {0: "nothing found", CANNOT_RUN: "needs the fake driver"}.get(
            done.returncode, f"status {done.returncode}"
        )
        found[name] = f"{outcome}: {said[-400:]}"
        report.add(**found)
        report.say(f"{name}: {outcome}")
