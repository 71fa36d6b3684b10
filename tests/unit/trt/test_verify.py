"""A plan is compared with ONNX Runtime, and one that differs too much is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from helpers import onnx_models

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Tensors
from inferq.workers.commands.build_progress import Steps
from inferq.workers.models.ranges import input_ranges, profile_sizes
from inferq.workers.models.repository import load_model
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.phases import BuildStopped
from inferq.workers.trt.verify import FLOOR, PER_MISMATCH, load_samples, make_samples, verify

#: y = x + x, of rows of three.
ONES = {"x": np.ones((2, 3), np.float32)}
ZEROS = {"x": np.zeros((2, 3), np.float32)}


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    onnx_models.double(tmp_path / "models" / "double" / "1" / "model.onnx")
    (tmp_path / "models" / "double" / "model.toml").write_text("max_batch_size = 8")
    return load_model(tmp_path / "models", "double")


def _off_by(error: float) -> Any:
    def run(inputs: Tensors) -> Mapping[str, Array]:
        return {"y": inputs["x"] * 2 + np.float32(error)}

    return run


def test_the_same_answers_have_no_error(spec: ModelSpec) -> None:
    samples = make_samples(spec, input_ranges(spec, profile_sizes(spec)[0]))
    assert verify(_off_by(0), spec, samples) == 0


def test_the_error_is_relative_to_the_outputs_largest_magnitude(spec: ModelSpec) -> None:
    error = verify(_off_by(0.01), spec, [ONES, ZEROS])
    assert error == pytest.approx(0.01 / (2 + FLOOR), rel=1e-3)


def test_what_is_as_good_as_zero_is_judged_absolutely(spec: ModelSpec) -> None:
    assert verify(_off_by(1e-6), spec, [ZEROS]) == pytest.approx(1e-6 / FLOOR)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 0.03), ("fp16", 0.2)])
def test_too_large_an_error_fails(spec: ModelSpec, precision: str, error: float) -> None:
    with pytest.raises(ConfigError, match=r"'double' as fp.. differs .*output 'y' of sample [12]"):
        verify(_off_by(error), spec, [ZEROS, ONES], precision=precision)


def test_fp16_may_differ_by_more_and_a_limit_can_be_given(spec: ModelSpec) -> None:
    assert verify(_off_by(0.03), spec, [ONES], precision="fp16") > 0.01
    with pytest.raises(ConfigError, match=r"expected at most 0\.001"):
        verify(_off_by(0.03), spec, [ONES], limit=0.001)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_on_one_side_is_an_infinite_error(spec: ModelSpec, bad: float) -> None:
    with pytest.raises(ConfigError, match="differs from ONNX Runtime by inf"):
        verify(_off_by(bad), spec, [ONES])


def test_not_a_number_on_both_sides_is_none(spec: ModelSpec) -> None:
    sample = {"x": np.array([[np.nan, np.inf, 1.0]], np.float32)}
    assert verify(_off_by(0), spec, [sample]) == 0


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({}, "output 'y' is missing"),
        ({"y": np.zeros((2, 4), np.float32)}, r"output 'y' is float32\[2, 4\]; expected float32"),
        ({"y": np.zeros((2, 3), np.float16)}, r"output 'y' is float16\[2, 3\]; expected float32"),
    ],
)
def test_outputs_of_another_kind_are_refused(
    spec: ModelSpec, answer: dict[str, Array], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        verify(lambda _: answer, spec, [ONES])


def test_of_integers_the_share_that_differs_counts(tmp_path: Path) -> None:
    onnx_models.write(
        tmp_path / "best" / "1" / "model.onnx",
        [onnx_models.node("ArgMax", "x", "y", axis=1, keepdims=0)],
        {"x": (onnx_models.FLOAT, ("batch", 3))},
        {"y": (onnx_models.INT64, ("batch",))},
    )
    best = load_model(tmp_path, "best")
    sample = {"x": np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]}

    def run(inputs: Tensors) -> Mapping[str, Array]:
        return {"y": np.array([0, 1, 2, 1])}

    assert verify(run, best, [sample], precision="fp16") == 0.25 * PER_MISMATCH
    with pytest.raises(ConfigError, match=r"differs from ONNX Runtime by 0\.025"):
        verify(run, best, [sample])


class _Noted(Steps):
    """Notes how far it is; stops at step `last`."""

    def __init__(self, last: int) -> None:
        super().__init__(1)
        self.last = last
        self.seen: list[str] = []

    def began(self, phase: str, depth: int, steps: int) -> None:
        self.seen.append(f"{phase} of {steps}")

    def went_on(self, phase: str, done: int) -> None:
        self.seen.append(f"{done}")
        self.stopped = len(self.seen) == self.last


def test_each_answer_is_a_step_and_may_be_the_last(spec: ModelSpec) -> None:
    whole = _Noted(0)
    verify(_off_by(0), spec, [ZEROS, ONES], progress=whole)
    assert whole.seen == [
        "Verifying: ONNX Runtime of 2", "1", "2", "Verifying: the plan of 2", "1", "2"
    ]  # fmt: skip
    for last in (2, 3, 5):
        stopped = _Noted(last)
        with pytest.raises(BuildStopped):
            verify(_off_by(0), spec, [ZEROS, ONES], progress=stopped)
        assert stopped.seen == whole.seen[:last]


def test_samples_have_the_profiles_shapes(spec: ModelSpec) -> None:
    samples = make_samples(spec, input_ranges(spec, profile_sizes(spec, (1, 4, 8))[0]))
    assert [sample["x"].shape for sample in samples] == [(1, 3), (1, 3), (4, 3), (8, 3)]
    assert not samples[0]["x"].any()
    assert all(sample["x"].any() for sample in samples[1:])
    again = make_samples(spec, input_ranges(spec, profile_sizes(spec, (1, 4, 8))[0]))
    np.testing.assert_array_equal(samples[3]["x"], again[3]["x"])


def test_samples_suit_models_that_take_indices(tmp_path: Path) -> None:
    path = onnx_models.lookup(tmp_path / "lookup" / "1" / "model.onnx", rows=4)
    spec = load_model(tmp_path, "lookup")
    # An index beyond the table crashes some engines.
    samples = make_samples(spec, input_ranges(spec, {"batch": (1, 4, 8)}))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for sample in samples:
        assert session.run(None, sample)[0].shape == (len(sample["ids"]), 2)


def test_inputs_can_be_given_in_a_file(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez_compressed(path, x=ONES["x"])
    (sample,) = load_samples(path, spec)
    np.testing.assert_array_equal(sample["x"], ONES["x"])


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"z": np.ones((2, 3), np.float32)}, r"inputs\.npz: inputs of model .* missing 'x'"),
        ({"x": np.ones((2, 3))}, "dtype float64; expected float32"),
        ({"x": np.ones((2, 4), np.float32)}, "has 4 at dim 1; expected 3"),
        ({"x": np.ones((9, 3), np.float32)}, "have 9 rows; expected 1 to 8"),
        ({"x": np.array([{}])}, "holds Python objects; expected numbers"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    spec: ModelSpec, tmp_path: Path, arrays: dict[str, Array], problem: str
) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=problem):
        load_samples(path, spec)


def test_a_file_that_is_no_npz_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    with pytest.raises(ConfigError, match=r"inputs\.npz cannot be read: No such file"):
        load_samples(path, spec)
    np.savez_compressed(path, x=ONES["x"])
    locked = bytearray(path.read_bytes())
    for place in (locked.find(b"PK\x03\x04") + 6, locked.find(b"PK\x01\x02") + 8):
        locked[place] |= 1
    for content in (b"junk", bytes(locked)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"inputs\.npz is no \.npz"):
            load_samples(path, spec)
    endless = b"\x93NUMPY\x01\x00\x05\x00((((\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", endless)
    with pytest.raises(ConfigError, match=r"inputs\.npz: x is no \.npy"):
        load_samples(path, spec)
