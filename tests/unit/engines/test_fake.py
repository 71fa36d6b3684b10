"""The fake engine echoes, waits and fails exactly as it is asked to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from helpers.repository import spec_of

from inferq.shared.errors import ConfigError, FatalEngineError
from inferq.shared.schema import Tensors
from inferq.workers.engines import fake
from inferq.workers.models.engine import Batch, Lane

INPUTS = [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}]


def _lane(**table: Any) -> Lane:
    return fake.FakeEngine(spec_of(None, {"inputs": INPUTS, **table})).load().lanes[0]


def _batch(*firsts: float) -> Batch:
    parts: list[Tensors] = [{"x": np.array([[first, 7]], np.float32)} for first in firsts]
    return Batch(parts, len(parts), len(parts))


def test_it_echoes_what_it_is_given() -> None:
    outputs = _lane().run(_batch(1, 2, 3))
    assert outputs["x"].tolist() == [[1, 7], [2, 7], [3, 7]]


def test_a_batch_takes_its_delay_and_that_of_each_row() -> None:
    lane = _lane(delay_ms=40, delay_ms_per_row=20.0)
    began = time.monotonic()
    lane.run(_batch(1, 2, 3))
    assert time.monotonic() - began >= 0.1


def test_without_faults_every_value_is_data() -> None:
    firsts = sorted(fake.FAULTS)
    assert _lane().run(_batch(*firsts))["x"][:, 0].tolist() == firsts


def test_with_faults_other_values_are_still_data() -> None:
    firsts = [0, -0.5, -7, 5]
    assert _lane(faults=True).run(_batch(*firsts))["x"][:, 0].tolist() == firsts


def test_raise_fails_the_whole_batch_of_the_culprit() -> None:
    lane = _lane(faults=True)
    with pytest.raises(ValueError, match="asked to raise"):
        lane.run(_batch(1, fake.FAULT_RAISE, 2))
    assert lane.run(_batch(1, 2))["x"].shape == (2, 2)


def test_fatal_says_that_the_engine_is_beyond_use() -> None:
    with pytest.raises(FatalEngineError):
        _lane(faults=True).run(_batch(fake.FAULT_FATAL))


def test_too_few_rows_keeps_one_row_back() -> None:
    assert _lane(faults=True).run(_batch(1, fake.FAULT_TOO_FEW_ROWS, 2))["x"].shape == (2, 2)


def test_only_the_first_row_of_a_request_can_be_a_fault() -> None:
    parts = [{"x": np.array([[1, 7], [fake.FAULT_RAISE, 7]], np.float32)}]
    assert _lane(faults=True).run(Batch(parts, 2, 2))["x"].shape == (2, 2)


def _process(fault: int) -> subprocess.Popen[str]:
    code = (
        "import numpy as np\n"
        "from inferq.shared.schema import Signature\n"
        "from inferq.workers.models.engine import Batch\n"
        "from inferq.workers.engines.fake import FakeEngine\n"
        "from inferq.workers.models.config import ModelConfig\n"
        "from inferq.workers.models.spec import ModelSpec\n"
        f"table = {{'inputs': {INPUTS!r}, 'faults': True}}\n"
        "known = ModelConfig(), table, Signature((), ()), 8, ()\n"
        "loaded = FakeEngine(ModelSpec('m', 1, (1,), None, *known)).load()\n"
        "print('running', flush=True)\n"
        f"loaded.lanes[0].run(Batch([{{'x': np.full((1, 2), {fault}, np.float32)}}], 1, 1))\n"
        "print('still here', flush=True)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("fault", "status"),
    [(fake.FAULT_EXIT, fake.EXIT_STATUS), (fake.FAULT_SEGFAULT, -signal.SIGSEGV)],
)
def test_exit_and_segfault_end_the_process_at_once(fault: int, status: int) -> None:
    process = _process(fault)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert said == "running\n"


def test_hang_does_not_come_back() -> None:
    process = _process(fake.FAULT_HANG)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "fake.inputs is missing"),
        ({"inputs": []}, "fake.inputs is []; expected at least 1 of them"),
        ({"inputs": INPUTS * 2}, "fake.inputs have the names ['x', 'x']; expected each once"),
        (
            {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 0]}]},
            "fake.inputs.0.shape.1 is 0; expected a size of at least 1, or a symbol",
        ),
        (
            {"inputs": [{"name": "x", "dtype": "text", "shape": []}]},
            "fake.inputs.0.dtype is 'text'; expected 'bool', 'int8'",
        ),
        (
            {"inputs": [{"name": "x", "dtype": "uint8", "shape": ["n"]}], "faults": True},
            "fake.inputs.0.dtype is 'uint8'; expected a signed integer or float",
        ),
        ({"inputs": INPUTS, "delay": 3}, "fake.delay is not a known key; did you mean 'delay_ms'?"),
        ({"inputs": INPUTS, "delay_ms": -1}, "fake.delay_ms is -1; expected at least 0"),
        ({"inputs": INPUTS, "faults": "yes"}, "fake.faults is 'yes'; expected true or false"),
    ],
)
def test_a_bad_table_is_refused_by_key_value_and_expectation(
    table: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        fake.FakeEngine.read(None, table)
    assert message in str(caught.value)
