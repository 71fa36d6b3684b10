"""The ONNX file is handed to TensorRT as it is, or in float16 with its inputs and outputs kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import onnx_models
from onnx import TensorProto, helper

from inferq.shared.errors import ConfigError
from inferq.workers.trt.precision import prepare

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8


def _linear(path: Path) -> Path:
    """x: float32[batch, 4] → y = relu(x · w)."""
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    return onnx_models.write(
        path,
        [onnx_models.node("MatMul", "xw", "z"), onnx_models.node("Relu", "z", "y")],
        {"x": (FLOAT, ("batch", 4))},
        {"y": (FLOAT, ("batch", 3))},
        [onnx.numpy_helper.from_array(w, "w")],
    )


def _quantised(path: Path) -> Path:
    nodes = [
        onnx_models.node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx_models.node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    return onnx_models.write(
        path,
        nodes,
        {"x": (FLOAT, ("batch", 4))},
        {"y": (FLOAT, ("batch", 4))},
        [
            helper.make_tensor("scale", FLOAT, [], [0.1]),
            helper.make_tensor("zero", TensorProto.INT8, [], [0]),
        ],
    )


def _photo(path: Path, *, end: str = "Cast", other: bool = False) -> Path:
    """pixels: uint8[batch, 2, 2, 3] → planes as floats, moved while they are bytes."""
    nodes = [onnx_models.node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2])]
    if end == "Cast":
        nodes.append(onnx_models.node("Cast", ["planes"], ["floats"], to=FLOAT))
    else:
        nodes.append(onnx_models.node("DequantizeLinear", ["planes", "scale"], ["floats"]))
    outputs: dict[str, tuple[int, Any]] = {"floats": (FLOAT, ("batch", 3, 2, 2))}
    if other:
        outputs["planes"] = (UINT8, ("batch", 3, 2, 2))
    scale = helper.make_tensor("scale", FLOAT, [], [1.0])
    return onnx_models.write(path, nodes, {"pixels": (UINT8, ("batch", 2, 2, 3))}, outputs, [scale])


def _run(model: bytes | Path, **inputs: Any) -> list[Any]:
    given = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(given, providers=["CPUExecutionProvider"])
    answer: list[Any] = session.run(None, inputs)
    return answer


def test_fp32_is_the_file_as_it_is(tmp_path: Path) -> None:
    assert prepare(_linear(tmp_path / "model.onnx"), "fp32") is None
    assert prepare(_quantised(tmp_path / "quantised.onnx"), "fp32") is None


def test_fp16_keeps_inputs_and_outputs_and_changes_what_is_within(tmp_path: Path) -> None:
    path = _linear(tmp_path / "model.onnx")
    converted = prepare(path, "fp16")
    assert converted is not None
    model = onnx.load_from_string(converted)
    values = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in values} == {FLOAT}
    assert [w.data_type for w in model.graph.initializer] == [TensorProto.FLOAT16]
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    (exact,), (near,) = _run(path, x=x), _run(converted, x=x)
    assert near.dtype == np.float32
    assert 0 < np.abs(exact - near).max() < 0.01


def test_external_weights_are_converted_too(tmp_path: Path) -> None:
    path = onnx_models.external(tmp_path / "model.onnx", "w.bin")
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    converted = prepare(path, "fp16")
    assert converted is not None
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(_run(converted, x=x)[0], x + np.arange(4))


def test_a_quantised_file_is_no_fp16(tmp_path: Path) -> None:
    path = _quantised(tmp_path / "model.onnx")
    with pytest.raises(
        ConfigError, match=r"precision is 'fp16', but .* is quantised already \(Deq.*expected 'fp32"
    ):
        prepare(path, "fp16")


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision is 'int8'; expected one of fp32, fp16"):
        prepare(tmp_path / "model.onnx", "int8")


def test_junk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"junk" * 100)
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be read as ONNX"):
        prepare(path, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bytes_are_cast_before_they_are_moved(tmp_path: Path, precision: str) -> None:
    path = _photo(tmp_path / "model.onnx")
    converted = prepare(path, precision)
    assert converted is not None
    model = onnx.load_from_string(converted)
    assert model.graph.input[0].type.tensor_type.elem_type == UINT8
    consumers = [node.op_type for node in model.graph.node if "pixels" in node.input]
    assert consumers == ["Cast"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3)).astype(np.uint8)
    np.testing.assert_array_equal(_run(path, pixels=pixels)[0], _run(converted, pixels=pixels)[0])


def test_bytes_that_are_used_as_bytes_stay(tmp_path: Path) -> None:
    assert prepare(_photo(tmp_path / "a.onnx", end="other"), "fp32") is None
    assert prepare(_photo(tmp_path / "b.onnx", other=True), "fp32") is None
