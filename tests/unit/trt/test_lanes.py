"""TensorRT's lanes: real PyCUDA on the fake driver, a double of the module tensorrt. No GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fakecuda import environment

TESTS = Path(__file__).parents[2]
CASES = re.findall(
    r"^def ([a-z]\w*)\(\) -> None", (TESTS / "helpers" / "trt_cases.py").read_text(), re.MULTILINE
)


def _run(driver: Path, case: str, **settings: str) -> None:
    env = environment(driver) | settings
    folders = [str(TESTS), str(TESTS / "helpers" / "double_trt"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    run = subprocess.run(
        [sys.executable, "-m", "helpers.trt_cases", case],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("case", CASES)
def test_tensorrts_lanes_on_the_fake_driver(fake_driver: Path, case: str) -> None:
    _run(fake_driver, case)


def test_streams_that_a_plan_wants_besides_are_given_to_it(fake_driver: Path) -> None:
    """TensorRT's own would wait for what another engine puts on the legacy default stream."""
    _run(
        fake_driver,
        "a_graph_answers_for_its_own_shapes_whatever_ran_since",
        DOUBLE_TRT_AUX_STREAMS="2",
    )


def test_the_cases_were_found() -> None:
    assert len(CASES) >= 4
