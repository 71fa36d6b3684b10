"""`make gpu-quick` as a dry run on the fake driver: a step tells figures, or why it has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gpu.quick.steps import STEPS
from helpers.fakecuda import environment

TESTS = Path(__file__).parents[1]
NO_CARD = TESTS / "helpers" / "no_card"
#: What the line of a step says that needs what is not here.
WHY_NOT = {"sanitizer": "the fake driver has no kernels to be watched"}
if find_spec("torch") is None:
    WHY_NOT |= dict.fromkeys(("warmups", "resnet"), "PyTorch is not there")
TIMEOUT_S = 340


def _run(driver: Path, out: Path, steps: str) -> tuple[int, list[dict[str, Any]], str]:
    env = environment(driver)
    env |= {"OUT": str(out), "PYTHONPATH": os.pathsep.join([str(TESTS), str(NO_CARD)])}
    done = subprocess.run(
        [sys.executable, "-m", "gpu.quick", "--steps", steps],
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    lines = (out / "gpu-quick.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(line) for line in lines], done.stdout + done.stderr


@pytest.mark.timeout(TIMEOUT_S + 10)
@pytest.mark.parametrize("step", [step.name for step in STEPS])
def test_each_step_of_a_dry_run_tells_figures_or_why_there_are_none(
    fake_driver: Path, tmp_path: Path, step: str
) -> None:
    status, (line,), said = _run(fake_driver, tmp_path, step)
    assert status == 0, said
    assert (line["step"], line["fake"]) == (step, True)
    if step in WHY_NOT:
        assert not line["ok"]
        assert line["why_not"].startswith(WHY_NOT[step])
    else:
        assert line["ok"]
        assert line["found"]["said"]
    assert "DRY RUN on the fake driver" in said
