"""Tiny ONNX files for tests, each with one property that matters for serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

Shape = Sequence[int | str | None] | None
#: Name → (element type, shape).
Tensors = Mapping[str, tuple[int, Shape]]

FLOAT = TensorProto.FLOAT
INT64 = TensorProto.INT64
STRING = TensorProto.STRING
BFLOAT16 = TensorProto.BFLOAT16


def write(
    path: Path,
    nodes: Sequence[Any],
    inputs: Tensors,
    outputs: Tensors,
    constants: Sequence[Any] = (),
) -> Path:
    """Write a model of these nodes to `path`, whose folders are made."""
    infos = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in each.items()]
        for each in (inputs, outputs)
    ]
    return _save(path, helper.make_graph(list(nodes), "test", *infos, list(constants)))


def _save(path: Path, graph: Any) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    """One operator of the default set."""
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


def ints(name: str, dims: Sequence[int], values: Sequence[int]) -> Any:
    """An int64 constant."""
    return helper.make_tensor(name, INT64, dims, values)


def double(path: Path, shape: Shape = ("batch", 3), out: Shape | str = "same") -> Path:
    """x: float32 → y = x + x."""
    y = shape if out == "same" else out
    assert not isinstance(y, str)
    return write(path, [node("Add", "xx", "y")], {"x": (FLOAT, shape)}, {"y": (FLOAT, y)})


def handed_through(path: Path) -> Path:
    """x: float32[batch, 3] → x as it is, and y = x + x."""
    shape = (FLOAT, ("batch", 3))
    return write(path, [node("Add", "xx", "y")], {"x": shape}, {"x": shape, "y": shape})


def reshaped(path: Path) -> Path:
    """x: float32[batch, 3] → y = x + x, by way of one row, and back by the shape that x has."""
    nodes = [
        node("Shape", "x", ["shape"]),
        node("Reshape", ["x", "flat"], ["row"]),
        node("Add", ["row", "row"], ["twice"]),
        node("Reshape", ["twice", "shape"], ["y"]),
    ]
    shape: Shape = ("batch", 3)
    return write(
        path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)}, [ints("flat", [2], [1, -1])]
    )


def two_inputs(path: Path, a: Shape = ("batch", 2), b: Shape = ("batch", 2)) -> Path:
    """a, b: float32 → doubled a, doubled b."""
    nodes = [node("Add", "aa", "c"), node("Add", "bb", "d")]
    return write(
        path, nodes, {"a": (FLOAT, a), "b": (FLOAT, b)}, {"c": (FLOAT, a), "d": (FLOAT, b)}
    )


def pooled(path: Path) -> Path:
    """x: float32[batch, seq, 4] → y doubled, and its sum along seq."""
    nodes = [node("Add", "xx", "y"), node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0)]
    return write(
        path,
        nodes,
        {"x": (FLOAT, ("batch", "seq", 4))},
        {"y": (FLOAT, ("batch", "seq", 4)), "sum": (FLOAT, ("batch", 4))},
        [ints("axes", [1], [1])],
    )


def total(path: Path) -> Path:
    """x: float32[batch, 3] → one row, the sum of all."""
    nodes = [node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)]
    shape: Shape = ("batch", 3)
    return write(
        path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, (1, 3))}, [ints("axes", [1], [0])]
    )


def first_row(path: Path) -> Path:
    """x: float32[batch, 3] → its first row alone, though the file promises all."""
    shape: Shape = ("batch", 3)
    condition = helper.make_tensor("first", TensorProto.BOOL, [1], [True])
    nodes = [node("Compress", ["x", "first"], ["y"], axis=0)]
    return write(path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)}, [condition])


def mixed_rows(path: Path) -> Path:
    """x: float32[batch, 3] → softmax over the batch: as many rows, but none independent."""
    shape: Shape = ("batch", 3)
    nodes = [node("Softmax", "x", "y", axis=0)]
    return write(path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)})


def company(path: Path, share: float = 0.05) -> Path:
    """x: float32[batch, 3] → x and a `share` of the batch's mean: rows are not independent."""
    shape: Shape = ("batch", 3)
    nodes = [
        node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        node("Mul", ["mean", "share"], ["part"]),
        node("Add", ["x", "part"], ["y"]),
    ]
    constants = [helper.make_tensor("share", FLOAT, [], [share])]
    return write(path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)}, constants)


def over(path: Path, threshold: float = 0.5) -> Path:
    """x: float32[batch, 3] → those of its rows that are above `threshold` throughout."""
    nodes = [
        node("ReduceMin", ["x"], ["least"], axes=[1], keepdims=0),
        node("Greater", ["least", "threshold"], ["chosen"]),
        node("Compress", ["x", "chosen"], ["y"], axis=0),
    ]
    constants = [helper.make_tensor("threshold", FLOAT, [], [threshold])]
    x: Shape = ("batch", 3)
    return write(path, nodes, {"x": (FLOAT, x)}, {"y": (FLOAT, ("batch", 3))}, constants)


#: What a request's values are to be above for `stalls_alone` and `fails_alone`.
ODD_ABOVE = 1e6


def stalls_alone(path: Path) -> Path:
    """x: float32[batch, 3] → x; but one row alone with a value above `ODD_ABOVE` never ends."""
    x: Shape = ("batch", 3)
    body = helper.make_graph(
        [node("Identity", ["going"], ["goes_on"]), node("Identity", ["before"], ["after"])],
        "body",
        [
            helper.make_tensor_value_info("turn", INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", FLOAT, x),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", FLOAT, x),
        ],
    )
    nodes = [
        *_if_odd_and_alone(),
        node("Where", ["odd", "many", "none"], ["turns"]),
        node("Loop", ["turns", "", "x"], ["y"], body=body),
    ]
    constants = [*_odd_and_alone(), ints("many", [], [10**15]), ints("none", [], [0])]
    return write(path, nodes, {"x": (FLOAT, x)}, {"y": (FLOAT, x)}, constants)


def fails_alone(path: Path) -> Path:
    """x: float32[batch, 3] → x; one row alone with a value above `ODD_ABOVE` is an error."""
    x: Shape = ("batch", 3)
    nodes = [
        *_if_odd_and_alone(),
        node("Where", ["odd", "outside", "first"], ["index"]),
        node("Gather", ["zero", "index"], ["nothing"]),
        node("Add", ["x", "nothing"], ["y"]),
    ]
    constants = [
        *_odd_and_alone(),
        ints("outside", [], [99]),
        ints("first", [], [0]),
        helper.make_tensor("zero", FLOAT, [1], [0.0]),
    ]
    return write(path, nodes, {"x": (FLOAT, x)}, {"y": (FLOAT, x)}, constants)


def _if_odd_and_alone() -> list[Any]:
    return [
        node("Shape", ["x"], ["rows"], start=0, end=1),
        node("Squeeze", ["rows"], ["count"]),
        node("Equal", ["count", "one"], ["alone"]),
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Greater", ["most", "above"], ["large"]),
        node("And", ["alone", "large"], ["odd"]),
    ]


def _odd_and_alone() -> list[Any]:
    return [ints("one", [], [1]), helper.make_tensor("above", FLOAT, [], [ODD_ABOVE])]


def noise(path: Path) -> Path:
    """x: float32[batch, 3] → as many random numbers, new ones each time."""
    shape: Shape = ("batch", 3)
    nodes = [node("RandomNormalLike", "x", "y")]
    return write(path, nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)})


def lookup(path: Path, rows: int = 4) -> Path:
    """ids: int64[batch] → float32[batch, 2] of a table of `rows`; other ids are an error."""
    table = helper.make_tensor("table", FLOAT, [rows, 2], [float(n) for n in range(2 * rows)])
    nodes = [node("Gather", ["table", "ids"], ["y"], axis=0)]
    return write(path, nodes, {"ids": (INT64, ("batch",))}, {"y": (FLOAT, ("batch", 2))}, [table])


def text_identity(path: Path) -> Path:
    """x: string[batch, 3] → y, the same."""
    shape: Shape = ("batch", 3)
    return write(path, [node("Identity", "x", "y")], {"x": (STRING, shape)}, {"y": (STRING, shape)})


def text_labels(path: Path) -> Path:
    """x: float32[batch, 3] → the label of the largest, as classifiers have it: string[batch]."""
    labels = helper.make_tensor("labels", STRING, [3], [b"bad", b"good", "schön".encode()])
    nodes = [
        node("ArgMax", "x", ["best"], axis=1, keepdims=0),
        node("Gather", ["labels", "best"], ["label"]),
    ]
    x, label = {"x": (FLOAT, ("batch", 3))}, {"label": (STRING, ("batch",))}
    return write(path, nodes, x, label, [labels])


def text_split(path: Path) -> Path:
    """x: string[batch] → y, its words, as many as the longest of the batch has."""
    graph = helper.make_graph(
        [helper.make_node("StringSplit", ["x"], ["y", "n"])],
        "test",
        [helper.make_tensor_value_info("x", STRING, ["batch"])],
        [
            helper.make_tensor_value_info("y", STRING, ["batch", "words"]),
            helper.make_tensor_value_info("n", INT64, ["batch"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def split(path: Path) -> Path:
    """A model that answers a sequence of tensors."""
    graph = helper.make_graph(
        [node("SplitToSequence", "x", "y")],
        "test",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 3])],
        [helper.make_tensor_sequence_value_info("y", FLOAT, None)],
    )
    return _save(path, graph)


def external(path: Path, location: str) -> Path:
    """x: float32[batch, 4] → x + w, where w stands in the file `location`."""
    weights = TensorProto(name="w", data_type=FLOAT, dims=[4])
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", "16")):
        weights.external_data.add(key=key, value=value)
    shape: Shape = ("batch", 4)
    graph = helper.make_graph(
        [node("Add", "xw", "y")],
        "test",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, shape)],
        [weights],
    )
    return _save(path, graph)


def wide_convolution(path: Path, channels: int = 256, side: int = 256) -> Path:
    """x: float32[batch, 3, side, side] → y [batch, 4, 1, 1]. One row takes `channels` × side² × 4
    bytes while it runs: 67 MB as it is, and a batch of 32 takes 2 GB.
    """
    first = helper.make_tensor("w", FLOAT, [channels, 3, 1, 1], [0.01] * channels * 3)
    second = helper.make_tensor("v", FLOAT, [4, channels, 1, 1], [0.01] * channels * 4)
    nodes = [
        node("Conv", "xw", "h"),
        node("GlobalAveragePool", "h", "g"),
        node("Conv", "gv", "y"),
    ]
    return write(
        path,
        nodes,
        {"x": (FLOAT, ("batch", 3, side, side))},
        {"y": (FLOAT, ("batch", 4, 1, 1))},
        [first, second],
    )


def default_input(path: Path) -> Path:
    """x: float32[batch, 2] → x · scale, where scale is [2, 3] unless a request gives another."""
    graph = helper.make_graph(
        [node("Mul", ["x", "scale"], ["y"])],
        "test",
        [
            helper.make_tensor_value_info("x", FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("scale", FLOAT, [2]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", 2])],
        [helper.make_tensor("scale", FLOAT, [2], [2.0, 3.0])],
    )
    return _save(path, graph)


def classifier(path: Path, labels: Sequence[str | int] = ("cat", "dog", "owl")) -> Path:
    """x: float32[batch, 3] → as skl2onnx writes it: int64 label[batch], a sequence of maps."""
    kind = "strings" if isinstance(labels[0], str) else "int64s"
    nodes = [
        node("Softmax", ["x"], ["probabilities"], axis=1),
        node("ArgMax", ["x"], ["output_label"], axis=1, keepdims=0),
        helper.make_node(
            "ZipMap",
            ["probabilities"],
            ["output_probability"],
            domain="ai.onnx.ml",
            **{f"classlabels_{kind}": list(labels)},
        ),
    ]
    key = STRING if kind == "strings" else INT64
    value = helper.make_tensor_type_proto(FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(key, value))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 3])],
        [
            helper.make_tensor_value_info("output_label", INT64, ["batch"]),
            helper.make_value_info("output_probability", maps),
        ],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path
