"""Tiny ONNX models whose answers padding leaves as they are, or does not, each for one reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, parser

from inferq.shared.schema import Array

HEAD: Final = '<ir_version: 8, opset_import: ["" : 17]>'
#: A transformer's layer: ids and mask; positions count the ids that are not 1, as RoBERTa's do.
ATTENTION: Final = """
g (int64[batch, seq] input_ids, {mask}[batch, seq] attention_mask)
    => (float[batch, seq, 4] hidden, float[batch, 4] pooled)
{{
  words = Gather<axis=0>(table, input_ids)
  other = Equal(input_ids, id1)
  real = Not(other)
  counted = Cast<to=7>(real)
  place = CumSum(counted, axis1)
  placed = Mul(place, counted)
  positions = Gather<axis=0>(places, placed)
  e = Add(words, positions)
  turned = Transpose<perm=[0, 2, 1]>(e)
  scores = MatMul(e, turned)
  there = Cast<to=1>(attention_mask)
  away = Sub(one, there)
  slope = Mul(away, low)
  bias3 = Unsqueeze(slope, axes1)
  masked = Add(scores, bias3)
  weights = Softmax<axis=-1>(masked)
  hidden = MatMul(weights, e)
  there3 = Unsqueeze(there, axes2)
  counting = Mul(hidden, there3)
  total = ReduceSum<keepdims=0>(counting, axes1)
  number = ReduceSum<keepdims=1>(there, axes1)
  pooled = Div(total, number)
}}
"""
X3: Final = "float[batch, 3, n] x"


@dataclass(frozen=True)
class Padded:
    """A model, and how its model.toml pads it."""

    graph: str
    #: Of each padded symbol: its table.
    pad: str
    #: Requests' sizes: symbol → the sizes that it takes.
    sizes: range = range(1, 17)


def toml(pad: str) -> str:
    """A model.toml of a model with the padded dims `pad`."""
    return f"max_queue_delay_ms = 3\nwarm_up = false\n{pad}"


def _pad(symbol: str = "n", value: str = "0", buckets: str = "[16]") -> str:
    return f"[pad.{symbol}]\nbuckets = {buckets}\nvalue = {value}\n"


def _conv(out: str, kernel: str, **attributes: str) -> str:
    given = ", ".join(f"{name}={value}" for name, value in attributes.items())
    return f"g ({X3}) => (float[batch, 2, {out}] y) {{ y = Conv<{given}>(x, {kernel}) }}"


def _chain(inputs: str, outputs: str, body: str) -> str:
    return f"g ({inputs}) => ({outputs}) {{ {body} }}"


def _lstm(out: str, direction: str, take: str, inputs: str = "", lengths: str = "") -> str:
    size = 2 if direction == "bidirectional" else 1
    return _chain(
        f"float[batch, n, 3] x{inputs}",
        f"float[batch, {out}, 4] y",
        "first = Transpose<perm=[1, 0, 2]>(x) all, last, cell = LSTM<hidden_size=4, "
        f'direction="{direction}">(first, w{size}, r{size}, b{size}{lengths}) y = {take}',
    )


#: Of an LSTM: all states, and the last ones.
_ALL, _LAST = "Transpose<perm=[2, 0, 1, 3]>(all)", "Transpose<perm=[1, 0, 2]>(last)"
_MASKED = "{ input_ids = 1, attention_mask = 0 }"

#: Padded as they say, these answer as they do alone.
RIGHT: Final = {
    "mask": Padded(ATTENTION.format(mask="int64"), _pad("seq", _MASKED, "[8, 16]")),
    "float_mask": Padded(ATTENTION.format(mask="float"), _pad("seq", _MASKED, "[8, 16]")),
    "stride": Padded(
        _conv("frames", "k2", kernel_shape="[2]", strides="[2]"),
        _pad(),
        range(2, 17),
    ),
    "misnamed_stride": Padded(
        _conv("n", "k2", kernel_shape="[2]", strides="[2]"), _pad(), range(2, 17)
    ),
    "audio_frames": Padded(
        _chain(
            "float[batch, 1, n] x",
            "float[batch, 2, frames] y",
            "y = Conv<kernel_shape=[400], strides=[160]>(x, k400)",
        ),
        _pad(buckets="[1600, 3200]"),
        range(400, 3201),
    ),
    "valid": Padded(_conv("m", "k3", kernel_shape="[3]"), _pad(buckets="[8, 16]"), range(3, 17)),
    "same": Padded(_conv("n", "k3", kernel_shape="[3]", pads="[1, 1]"), _pad()),
    "twice": Padded(
        _chain(X3, "float[batch, 2, twice] y", "y = ConvTranspose<strides=[2]>(x, t2)"), _pad()
    ),
    "nearest": Padded(
        _chain(
            X3,
            "float[batch, 3, twice] y",
            'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", '
            'nearest_mode="floor">(x, , scales)',
        ),
        _pad(),
    ),
    "half_again": Padded(
        _chain(
            X3,
            "float[batch, 3, more] y",
            'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", '
            'nearest_mode="floor">(x, , again)',
        ),
        _pad(),
    ),
    "ceiled_pool": Padded(
        _chain(
            X3,
            "float[batch, 3, half] y",
            "y = MaxPool<kernel_shape=[2], strides=[2], ceil_mode=1>(x)",
        ),
        _pad(value="-inf"),
        range(2, 17),
    ),
    "pyramid": Padded(
        _chain(
            X3,
            "float[batch, 2, m] y",
            "h = MaxPool<kernel_shape=[4], strides=[4]>(x) y = ConvTranspose<strides=[4]>(h, s4)",
        ),
        _pad(value="-inf", buckets="[16, 200]"),
        range(1, 201),
    ),
    "maximum": Padded(
        _chain(X3, "float[batch, 3, 1] y", "y = GlobalMaxPool(x)"), _pad(value="-3e38")
    ),
    "infinite_maximum": Padded(
        _chain(X3, "float[batch, 3, 1] y", "y = GlobalMaxPool(x)"), _pad(value="-inf")
    ),
    "sum": Padded(_chain(X3, "float[batch, 3] y", "y = ReduceSum<keepdims=0>(x, axes2)"), _pad()),
    "forward_lstm": Padded(_lstm("n, 1", "forward", _ALL), _pad()),
    "argmax": Padded(
        _chain("float[batch, n] x", "int64[batch] y", "y = ArgMax<axis=1, keepdims=0>(x)"),
        _pad(value="-3e38"),
    ),
    "cumulative": Padded(
        _chain("float[batch, n] x", "float[batch, n] y", "y = CumSum(x, axis1)"), _pad()
    ),
    "causal": Padded(
        _chain(
            "float[batch, n, 4] x",
            "float[batch, n, 4] y",
            "turned = Transpose<perm=[0, 2, 1]>(x) scores = MatMul(x, turned) "
            "shape = Shape(scores) ones = Expand(one, shape) later = Trilu<upper=1>(ones, k1) "
            "slope = Mul(later, low) masked = Add(scores, slope) "
            "weights = Softmax<axis=-1>(masked) y = MatMul(weights, x)",
        ),
        _pad(),
    ),
    "shared": Padded(
        _chain(
            "float[batch, n] a, float[batch, n] b",
            "float[batch, n] c, float[batch, n] d",
            "c = Add(a, b) d = Sub(a, b)",
        ),
        _pad(value="{ a = 3.5 }"),
    ),
    "two_names_of_one_size": Padded(
        _chain("float[batch, a] x, float[batch, b] y", "float[batch, c] z", "z = Mul(x, y)"),
        _pad("a") + _pad("b"),
    ),
    "picture": Padded(
        _chain(
            "float[batch, 3, h, w] x",
            "float[batch, 2, h2, w2] y",
            "y = Conv<kernel_shape=[3, 3], strides=[2, 2]>(x, k33)",
        ),
        _pad("h", buckets="[8, 12]") + _pad("w"),
        range(3, 9),
    ),
    "words": Padded(
        _chain("int64[batch, n] x", "float[batch, n, 4] y", "y = Gather<axis=0>(table, x)"),
        _pad(),
    ),
    "bytes": Padded(
        _chain("uint8[batch, n] x", "uint8[batch, n] y", "y = Identity(x)"), _pad(value="255")
    ),
    "past": Padded(
        _chain(
            "float[batch, past, 2] p, float[batch, n, 2] x",
            "float[batch, total, 2] present, float[batch, n, 2] y",
            "present = Concat<axis=1>(p, x) y = Add(x, x)",
        ),
        _pad(),
    ),
    "squeezed": Padded(
        _chain("float[1, n, 2] x", "float[n, 2] y", "y = Squeeze(x, axes0)"), _pad()
    ),
    "lengths": Padded(
        _lstm("2", "bidirectional", _LAST, ", int32[batch] lens", ", lens"),
        _pad(),
    ),
    "multiples_of_4": Padded(
        _chain(
            X3,
            "float[batch, 2, n] y",
            "h = Conv<kernel_shape=[4], strides=[4]>(x, k4) "
            "u = ConvTranspose<strides=[4]>(h, s4) s = Conv<kernel_shape=[1]>(x, k1x1) "
            "y = Add(u, s)",
        ),
        _pad(),
        range(4, 17, 4),
    ),
}

#: Padding changes what these answer: model, and a part of the reason.
WRONG: Final = {
    "mask_padded_with_1": (
        Padded(ATTENTION.format(mask="int64"), _pad("seq", "1", "[8, 16]")),
        "expected value = { input_ids = 1, attention_mask = 0 } in [pad.seq], under which",
    ),
    "float_mask_padded_with_1": (
        Padded(ATTENTION.format(mask="float"), _pad("seq", "1", "[8, 16]")),
        "expected value = { input_ids = 1, attention_mask = 0 } in [pad.seq], under which",
    ),
    "same_stride": (
        Padded(
            _conv("m", "k3", kernel_shape="[3]", strides="[2]", auto_pad='"SAME_UPPER"'),
            _pad(),
        ),
        "n 15 is padded to 16",
    ),
    "two_layers": (
        Padded(
            _chain(
                X3,
                "float[batch, 2, n] y",
                "h = Conv<kernel_shape=[3], pads=[1, 1]>(x, s3, bias) "
                "y = Conv<kernel_shape=[3], pads=[1, 1]>(h, k3)",
            ),
            _pad(),
        ),
        "output 'y' differs by",
    ),
    "mean": (
        Padded(_chain(X3, "float[batch, 3, 1] y", "y = GlobalAveragePool(x)"), _pad()),
        "expected no [pad.n]",
    ),
    "maximum_padded_with_0": (
        Padded(_chain(X3, "float[batch, 3, 1] y", "y = GlobalMaxPool(x)"), _pad()),
        "expected value = { x = -1e+09 } in [pad.n]",
    ),
    "softmax": (
        Padded(_chain("float[batch, n] x", "float[batch, n] y", "y = Softmax<axis=1>(x)"), _pad()),
        "expected value = { x = -1e+09 } in [pad.n]",
    ),
    "mean_as_a_flag": (
        Padded(
            _chain(
                "float[batch, n] x",
                "bool[batch, 1] y",
                "m = ReduceMean<axes=[1]>(x) y = Greater(m, quarter)",
            ),
            _pad(buckets="[64]"),
        ),
        "output 'y' differs in 1 of 1 values",
    ),
    "mean_behind_a_mask": (
        Padded(
            _chain(
                "float[batch, n, 2] x",
                "float[batch, 2] y",
                "m = ReduceMean<axes=[1], keepdims=0>(x) t = Tanh(m) y = Add(t, far)",
            ),
            _pad(),
        ),
        "output 'y' differs by",
    ),
    "attention_without_mask": (
        Padded(
            _chain(
                "float[batch, n, 4] x",
                "float[batch, n, 4] y",
                "turned = Transpose<perm=[0, 2, 1]>(x) scores = MatMul(x, turned) "
                "weights = Softmax<axis=-1>(scores) y = MatMul(weights, x)",
            ),
            _pad(),
        ),
        "expected no [pad.n]",
    ),
    "bidirectional_lstm": (
        Padded(_lstm("n, 2", "bidirectional", _ALL), _pad()),
        "expected no [pad.n]",
    ),
    "last_state": (
        Padded(_lstm("1", "forward", _LAST), _pad()),
        "expected no [pad.n]",
    ),
    "argmax_padded_with_0": (
        Padded(
            _chain("float[batch, n] x", "int64[batch] y", "y = ArgMax<axis=1, keepdims=0>(x)"),
            _pad(),
        ),
        "output 'y' differs in 1 of 1 values",
    ),
    "reversed": (
        Padded(
            _chain(
                "float[batch, n] x",
                "float[batch, n] y",
                "y = Slice(x, minus1, lowest, axes1, minus1)",
            ),
            _pad(),
        ),
        "expected no [pad.n]",
    ),
    "flat_picture": (
        Padded(
            _chain("float[batch, 3, h, w] x", "float[batch, 3, hw] y", "y = Reshape(x, flat)"),
            _pad("h") + _pad("w"),
        ),
        "dim 2 of output 'y' depends on both pad.h and pad.w",
    ),
    "past_behind": (
        Padded(
            _chain(
                "float[batch, past, 2] p, float[batch, n, 2] x",
                "float[batch, total, 2] present",
                "present = Concat<axis=1>(x, p)",
            ),
            _pad(),
        ),
        "expected no [pad.n]",
    ),
    "places_that_are_not_0": (
        Padded(_chain("float[1, n] x", "int64[2, k] y", "y = NonZero(x)"), _pad()),
        "output 'y' differs in shape",
    ),
    "far_words": (
        Padded(
            _chain("int64[batch, n] x", "float[batch, n, 4] y", "y = Gather<axis=0>(table, x)"),
            _pad(value="900"),
        ),
        "the model fails",
    ),
}


def write(path: Path, padded: Padded) -> Path:
    """Write a model of this module to `path`, whose folders are made."""
    model = copy.deepcopy(_parsed(padded.graph))
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(tensor for tensor in _constants() if tensor.name in used)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


@lru_cache
def _parsed(graph: str) -> onnx.ModelProto:
    return parser.parse_model(f"{HEAD} {graph}")


def _constants() -> list[onnx.TensorProto]:
    rng = np.random.default_rng(3)
    weights = {
        "table": (64, 4), "places": (64, 4), "k2": (2, 3, 2), "k3": (2, 3, 3), "s3": (3, 3, 3),
        "k4": (3, 3, 4), "s4": (3, 2, 4), "k1x1": (2, 3, 1), "k400": (2, 1, 400), "t2": (3, 2, 2),
        "k33": (2, 3, 3, 3), "bias": (3,), "w1": (1, 16, 3), "r1": (1, 16, 4),
        "w2": (2, 16, 3), "r2": (2, 16, 4),
        "b1": (1, 32), "b2": (2, 32),
    }  # fmt: skip
    numbers = {
        "one": [1.0],
        "low": [-10_000.0],
        "scales": [1.0, 1.0, 2.0],
        "again": [1, 1, 1.5],
        "quarter": [0.25],
        "far": [-1e9, 0.0],
    }
    whole = {
        "axes0": [0], "axes1": [1], "axes2": [2], "id1": [1], "minus1": [-1],
        "lowest": [-(1 << 62)], "flat": [0, 3, -1],
    }  # fmt: skip
    return [
        *(
            helper.make_tensor(name, TensorProto.FLOAT, shape, rng.standard_normal(shape).ravel())
            for name, shape in weights.items()
        ),
        *(helper.make_tensor(n, TensorProto.FLOAT, [len(v)], v) for n, v in numbers.items()),
        *(helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in whole.items()),
        *(helper.make_tensor(n, TensorProto.INT64, [], [v]) for n, v in (("axis1", 1), ("k1", 1))),
    ]


def request(padded: Padded, rng: np.random.Generator, number: int) -> dict[str, Array]:
    """Inputs of one row or two, whose sizes go through all that the model takes."""
    graph = _parsed(padded.graph).graph
    rows = 1 + int(rng.integers(2))
    chosen: dict[str, int] = {"past": 1 + number % 2}
    inputs: dict[str, Array] = {}
    for value in graph.input:
        tensor = value.type.tensor_type
        shape = [
            dim.dim_value
            or rows * (dim.dim_param == "batch")
            or chosen.setdefault(
                "a" if dim.dim_param == "b" else dim.dim_param,
                padded.sizes[number * (6 * len(chosen) - 5) % len(padded.sizes)],
            )
            for dim in tensor.shape.dim
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if "mask" in value.name:
            hidden = rng.random(shape) < 0.3
            hidden[:, 0] = False
            inputs[value.name] = (~hidden).astype(dtype)
        elif value.name == "lens":
            inputs[value.name] = np.full(shape, chosen["n"], dtype)
        elif dtype.kind == "f":
            inputs[value.name] = rng.standard_normal(shape).astype(dtype)
        else:
            inputs[value.name] = rng.integers(2, 50, shape).astype(dtype)
    return inputs
