"""ONNX Runtime on CUDA: its errors, asked of the fake driver (helpers/fakecuda). No GPU.

The build of ONNX Runtime here has no CUDA, so a double of its session raises what one that has
raises: a RuntimeException whose text holds the CUDA error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from helpers import onnx_models
from helpers.fakecuda import run_python
from helpers.repository import spec_of

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.workers.engines import onnxruntime
from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine
from inferq.workers.models.engine import Batch, LoadedModel

#: A lane of a session that raises once its device answers `CODE` to every call.
_LANE = """
import ctypes, threading
import numpy as np
from helpers.fakecuda.control import Control
from inferq.shared.errors import EngineError
from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.workers.engines import onnxruntime
from inferq.workers.models.engine import Batch

CONTROL = Control()
CUDA = ctypes.CDLL("libcuda.so.1")
CODE = {code}

class Output:
    name = "y"

class Session:
    fails = True

    def get_outputs(self):
        return [Output()]

    def run(self, names, inputs):
        CONTROL.fail(CODE)
        if self.fails:
            raise RuntimeError(f"[ONNXRuntimeError] : 6 : CUDA failure {{CODE}}: it says so")
        return [inputs["x"]]

session = Session()
lane = onnxruntime.OnnxRuntimeLane(session, on_cuda={on_cuda})
batch = Batch([{{"x": np.ones((1, 3), np.float32)}}], 1, 1)
if {started}:
    context = ctypes.c_void_p()
    assert not CUDA.cuInit(0)
    assert not CUDA.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
COUNTS = "contexts", "primary_retains", "streams"

def run():
    before = {{name: CONTROL.count(name) for name in COUNTS}}
    calls = CONTROL.count("calls")
    try:
        lane.run(batch)
        print("ran")
    except EngineError as problem:
        print(type(problem).__name__, problem.message, sep=": ")
    print("asked", CONTROL.count("calls") > calls)
    if CODE == 0:
        assert before == {{name: CONTROL.count(name) for name in COUNTS}}
        current = ctypes.c_void_p()
        assert not CUDA.cuCtxGetCurrent(ctypes.byref(current)) and not current.value

thread = threading.Thread(target=run)  # no context is current in it
thread.start()
thread.join()
session.fails = False
if CODE == 0:
    run()
"""


def _lane(driver: Path, code: int, *, on_cuda: bool = True, started: bool = True) -> list[str]:
    """What a run comes to whose device answers `code` from then on."""
    source = _LANE.format(code=code, on_cuda=on_cuda, started=started)
    return run_python(source, driver).splitlines()


@pytest.mark.parametrize("code", [214, 700, 702, 710, 719])
def test_an_error_that_stays_ends_the_engine(fake_driver: Path, code: int) -> None:
    said, _ = _lane(fake_driver, code)
    assert said.startswith("FatalEngineError: CUDA is beyond use: CUDA_ERROR_"), said
    assert f"CUDA failure {code}: it says so" in said


def test_any_other_error_is_that_batchs_alone(fake_driver: Path) -> None:
    said, _, *next_run = _lane(fake_driver, 0)
    assert said.startswith("EngineError: onnxruntime: [ONNXRuntimeError] : 6 : CUDA failure 0")
    assert next_run == ["ran", "asked False"]


@pytest.mark.parametrize("code", [2, 600, 900, 901, 906])
def test_short_memory_and_a_broken_capture_end_nothing(fake_driver: Path, code: int) -> None:
    assert _lane(fake_driver, code)[0].startswith("EngineError: ")


def test_on_the_cpu_no_driver_is_asked(fake_driver: Path) -> None:
    said, asked = _lane(fake_driver, 700, on_cuda=False)
    assert said.startswith("EngineError: ")
    assert asked == "asked False"


def test_an_error_before_the_device_was_used_is_that_batchs_alone(fake_driver: Path) -> None:
    said, _, *rest = _lane(fake_driver, 0, started=False)
    assert said.startswith("EngineError: ")
    assert rest == ["ran", "asked False"]


# --- loading -------------------------------------------------------------------------------------


class _Build:
    """A double of the parts of a build of ONNX Runtime that has CUDA; the model runs on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        #: Of the next sessions: the error of opening one with CUDA; whether it falls back.
        self.error: Exception | None = None
        self.falls_back = False
        #: What `context_failure` answers.
        self.failure: str | None = None
        real, build = ort.InferenceSession, self

        class Session:
            def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
                build.asked.append(providers)
                self._on_cuda = len(providers) > 1 and not build.falls_back
                if self._on_cuda and build.error is not None:
                    raise build.error
                self._session = real(path, options, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return ["CUDAExecutionProvider"] * self._on_cuda + ["CPUExecutionProvider"]

            def __getattr__(self, name: str) -> Any:
                return getattr(self._session, name)

        monkeypatch.setattr(ort, "InferenceSession", Session)
        both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(ort, "get_available_providers", lambda: both)
        monkeypatch.setattr(onnxruntime, "context_failure", lambda: self.failure)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> _Build:
    return _Build(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return onnx_models.double(tmp_path / "1" / "model.onnx")


def _load(path: Path, *, most: int = 8, **options: Any) -> LoadedModel:
    return OnnxRuntimeEngine(spec_of(path, options.pop("table", {}), most=most, **options)).load()


def test_on_cuda_batches_have_few_sizes(build: _Build, file: Path) -> None:
    """Each size costs cuDNN a choice of algorithms, and memory."""
    assert _load(file).device == "cuda"
    assert _load(file).buckets == (1, 2, 4, 8)
    assert _load(file, most=5).buckets == (1, 2, 4, 5)
    assert _load(file, buckets=(4, 8)).buckets == (4, 8)
    assert _load(file, table={"provider": "cpu"}).buckets == ()


def test_on_cuda_no_algorithms_are_tried_out_for_each_size(build: _Build, file: Path) -> None:
    _load(file)
    (asked,) = build.asked
    assert asked == [
        ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}),
        "CPUExecutionProvider",
    ]


def test_its_lanes_ask_the_device_what_an_error_means(build: _Build, file: Path) -> None:
    (lane,) = _load(file).lanes
    wrong = Batch([{"x": np.ones((1, 4), np.float32)}], 1, 1)
    with pytest.raises(EngineError, match=r"^onnxruntime: ") as caught:
        lane.run(wrong)
    assert not isinstance(caught.value, FatalEngineError)
    build.failure = "CUDA_ERROR_ASSERT"
    with pytest.raises(FatalEngineError, match="CUDA is beyond use: CUDA_ERROR_ASSERT"):
        lane.run(wrong)


def test_a_model_is_not_refused_for_an_error_that_an_earlier_one_has_left(
    build: _Build, file: Path
) -> None:
    """Refused it would stay so in the process that follows, where nothing is wrong with it."""
    build.error = RuntimeError("CUDA failure 700")
    with pytest.raises(ConfigError, match="cannot be loaded by ONNX Runtime: CUDA failure 700"):
        _load(file)
    build.failure = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(FatalEngineError, match="CUDA is beyond use: CUDA_ERROR_ILLEGAL_ADDRESS"):
        _load(file)


def test_a_model_does_not_move_to_the_cpu_for_an_error_that_an_earlier_one_has_left(
    build: _Build, file: Path
) -> None:
    build.falls_back = True
    assert _load(file).device == "cpu"
    build.failure = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(FatalEngineError, match="CUDA is beyond use: CUDA_ERROR_ILLEGAL_ADDRESS"):
        _load(file)
