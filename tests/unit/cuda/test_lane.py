"""Lanes on a CUDA device: real PyCUDA on the fake driver (helpers/fakecuda). No GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fakecuda import environment

HELPERS = Path(__file__).parents[2] / "helpers"
CASES = re.findall(
    r"^def ([a-z]\w*)\(\) -> None", (HELPERS / "cuda_cases.py").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("case", CASES)
def test_lanes_on_the_fake_driver(fake_driver: Path, case: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "helpers.cuda_cases", case],
        env=environment(fake_driver),
        cwd=HELPERS.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_the_cases_were_found() -> None:
    assert len(CASES) >= 9
