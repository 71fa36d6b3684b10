"""The torch engine on CUDA lanes: real lanes on a fake driver and a fake of torch.cuda. No GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fakecuda import environment

pytest.importorskip("torch", reason='PyTorch is not installed: pip install "inferq[torch]"')

HELPERS = Path(__file__).parents[2] / "helpers"
CASES = re.findall(
    r"^def ([a-z]\w*)\(\) -> None", (HELPERS / "torch_cases.py").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("case", CASES)
def test_torch_on_lanes_of_the_fake_driver(fake_driver: Path, case: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "helpers.torch_cases", case],
        env=environment(fake_driver),
        cwd=HELPERS.parent,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr


def test_the_cases_were_found() -> None:
    assert len(CASES) == 5
