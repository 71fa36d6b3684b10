"""What real ONNX files have that servers stumble over, each in a tiny model of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

from helpers import onnx_models
from helpers.onnx_models import FLOAT, node

_HEAD: Final = '<ir_version: 10, opset_import: ["" : 21]>'
_PAIR: Final = "(float[batch, 4] x) => (float[batch, 4] y)"

#: By name, as text.
TEXTS: Final[Mapping[str, str]] = {
    # The first step of a decoder has no past: past_len is 0.
    "past-concat": """g (float[batch, 1] x, float[batch, 2, past_len, 4] past)
        => (float[batch, 2, total, 4] present, float[batch, 1] y)
        <int64[4] sh = {-1, 1, 1, 1}, int64[4] ex = {1, 2, 1, 4}, int64[2] ax = {2, 3},
         int64[1] one = {1}> {
        r = Reshape(x, sh)  e = Expand(r, ex)  present = Concat<axis=2>(past, e)
        s = ReduceSum<keepdims=0>(present, ax)  y = ReduceSum<keepdims=1>(s, one) }""",
    "argpeaks": """g (float[batch, n] x) => (int64[k, 2] where) <int64[1] ax = {1}> {
        mx = ReduceMax<keepdims=1>(x, ax)  e = Equal(x, mx)  nz = NonZero(e)
        where = Transpose<perm=[1, 0]>(nz) }""",
    "conf-filter": """g (float[batch, 4] x) => (float[k, 4] kept)
        <int64[1] ax = {1}, float thr = {0.05}> {
        s = ReduceMax<keepdims=0>(x, ax)  m = Greater(s, thr)  kept = Compress<axis=0>(x, m) }""",
    "company5": f"""g {_PAIR} <int64[1] ax = {{0}}, float a = {{0.05}}> {{
        m = ReduceMean<keepdims=1>(x, ax)  s = Mul(m, a)  y = Add(x, s) }}""",
    "mixed-dtypes": """g (float16[batch, 4] a, bool[batch, 4] b, uint8[batch, 4] c,
        int64[batch, 4] d, double[batch, 4] e)
        => (double[batch, 4] y, bool[batch, 4] nb, float16[batch, 4] a2) {
        bf = Cast<to=11>(b)  cf = Cast<to=11>(c)  df = Cast<to=11>(d)  af = Cast<to=11>(a)
        s1 = Add(af, bf)  s2 = Add(cf, df)  s3 = Add(s1, s2)  y = Add(s3, e)  nb = Not(b)
        a2 = Add(a, a) }""",
    "param1": """g (float[batch, 4] x, float[1] temperature) => (float[batch, 4] y) {
        y = Div(x, temperature) }""",
    "scalar-param": """g (float[batch, 4] x, float threshold) => (bool[batch, 4] y) {
        y = Greater(x, threshold) }""",
    "scalar-out": """g (float[batch, 4] x) => (float[batch, 4] y, float mean) {
        y = Relu(x)  mean = ReduceMean<keepdims=0>(x) }""",
    "seqout": """g (float[batch, 4] x) => (float[batch, 4] y, seq(float[batch, 2]) parts) {
        y = Relu(x)  parts = SplitToSequence<axis=1>(x) }""",
    "nan": f"g {_PAIR} {{ y = Log(x) }}",
}


def _file(root: Path, name: str) -> Path:
    path = root / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def text(root: Path, name: str, source: str | None = None) -> Path:
    """The model `name` of `TEXTS`, or of `source`, in the repository `root`."""
    path = _file(root, name)
    path.write_bytes(parsed(source or TEXTS[name]).SerializeToString())
    return path


def parsed(source: str, head: str = _HEAD) -> Any:
    """A graph written as text, as a model."""
    return onnx.parser.parse_model(f"{head} {source}")


def many(root: Path, name: str, inputs: int, outputs: int) -> Path:
    """x0, x1 …: float32[batch, 2] → y0 their sum, y1 = -y0, y2 = -y1 …"""
    shape = ("batch", 2)
    nodes = [node("Sum", [f"x{n}" for n in range(inputs)], ["y0"])]
    nodes += [node("Neg", [f"y{n - 1}"], [f"y{n}"]) for n in range(1, outputs)]
    return onnx_models.write(
        _file(root, name),
        nodes,
        {f"x{n}": (FLOAT, shape) for n in range(inputs)},
        {f"y{n}": (FLOAT, shape) for n in range(outputs)},
    )


def named(root: Path, name: str, source: str, target: str) -> Path:
    """Relu, with an input and an output of these names."""
    shape = ("batch", 2)
    nodes = [helper.make_node("Relu", [source], [target])]
    return onnx_models.write(
        _file(root, name), nodes, {source: (FLOAT, shape)}, {target: (FLOAT, shape)}
    )


#: Rows that depend on each other, in a batch of fixed size.
FIXED_MIXED: Final = "g (float[8, 4] x) => (float[8, 4] y) { y = Softmax<axis=0>(x) }"


def lstm(path: Path, hidden: int = 3) -> Path:
    """x: [batch, sequence, 2], h0, c0: [1, batch, hidden] → y, hn, cn, as PyTorch exports it."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        node("LSTM", ["xt", "w", "r", "", "", "h0", "c0"], ["ys", "hn", "cn"], hidden_size=hidden),
        node("Squeeze", ["ys", "axis"], ["yt"]),
        node("Transpose", ["yt"], ["y"], perm=[1, 0, 2]),
    ]
    state = (1, "batch", hidden)
    weights = [
        numpy_helper.from_array(rng.standard_normal((1, 4 * hidden, size)).astype("f4"), name)
        for name, size in (("w", 2), ("r", hidden))
    ]
    return onnx_models.write(
        path,
        nodes,
        {"x": (FLOAT, ("batch", "seq", 2)), "h0": (FLOAT, state), "c0": (FLOAT, state)},
        {"y": (FLOAT, ("batch", "seq", hidden)), "hn": (FLOAT, state), "cn": (FLOAT, state)},
        [*weights, onnx_models.ints("axis", [1], [1])],
    )


#: What else there is, by name.
OTHERS: Final[Mapping[str, Callable[[Path, str], Path]]] = {
    "in66": lambda root, name: many(root, name, 66, 1),
    "out66": lambda root, name: many(root, name, 1, 66),
    "in512out512": lambda root, name: many(root, name, 512, 512),
    "default-input": lambda root, name: onnx_models.default_input(_file(root, name)),
    "casts": lambda root, name: onnx_models.lookup(_file(root, name)),
    "zipmap": lambda root, name: onnx_models.classifier(_file(root, name)),
    "lstm": lambda root, name: lstm(_file(root, name)),
    "fixed8": lambda root, name: onnx_models.double(_file(root, name), (8, 3)),
    "fixed8-mixed": lambda root, name: text(root, name, FIXED_MIXED),
    "names-tf": lambda root, name: named(
        root, name, "serving_default_input_1:0", "StatefulPartitionedCall:0"
    ),
    "names-space": lambda root, name: named(root, name, "my input/0 é", "out put"),
    "names-reserved": lambda root, name: named(root, name, "inputs", "model"),
}


def write(root: Path, name: str, toml: str = "") -> Path:
    """The model `name` of either, with this model.toml."""
    path = OTHERS[name](root, name) if name in OTHERS else text(root, name)
    if toml:
        (root / name / "model.toml").write_text(toml)
    return path
