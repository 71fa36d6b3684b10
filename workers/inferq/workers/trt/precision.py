"""The ONNX file as TensorRT is given it: in which precision, and in the form that it takes.

TensorRT computes in the types that the file has. So "fp32" is the file as it is, quantised parts
included, and for "fp16" weights and inner tensors become float16 while inputs and outputs keep
their types. Operators that need float32's range stay in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args

from inferq.shared.errors import ConfigError

Precision = Literal["fp32", "fp16"]
PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)

#: Protobuf's own limit.
MAX_MODEL_BYTES: Final = (1 << 31) - 1

_QUANTISED: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
#: Operators that only move the elements of their first input, which TensorRT does not do of bytes.
_MOVES: Final = frozenset(
    {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Expand"}
)


def check_precision(name: str) -> None:
    """ConfigError unless `name` is a precision."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision is {name!r}; expected one of {', '.join(PRECISIONS)}")


def prepare(path: Path, precision: str) -> bytes | None:
    """The ONNX file `path` as TensorRT shall get it; None: as it is.

    Raises ConfigError: the file cannot be read or converted, or is quantised already while
    `precision` is not "fp32".
    """
    import onnx  # noqa: PLC0415 (heavy)

    check_precision(precision)
    try:
        model = onnx.load(path, load_external_data=precision == "fp16")
    # Whatever protobuf or onnx raise for a file that is no model.
    except Exception as problem:
        raise ConfigError(f"{path} cannot be read as ONNX: {_reason(problem)}") from problem
    changed = _casts_bytes_first(model.graph)
    if precision == "fp16":
        _refuse_quantised(path, model)
        model, changed = _to_fp16(path, model), True
    if not changed:
        return None
    try:
        return bytes(model.SerializeToString())
    except Exception as problem:
        raise ConfigError(
            f"{path} has more than {MAX_MODEL_BYTES} bytes once it is converted; expected fewer "
            f"({_reason(problem)})"
        ) from problem


def _to_fp16(path: Path, model: Any) -> Any:
    from onnxruntime.transformers import float16  # noqa: PLC0415 (heavy)

    try:
        with warnings.catch_warnings():
            # One for each weight that is rounded to float16's smallest or largest.
            warnings.simplefilter("ignore")
            return float16.convert_float_to_float16(model, keep_io_types=True)
    except Exception as problem:
        raise ConfigError(
            f"{path} cannot be converted to fp16: {_reason(problem)}; expected --precision fp32"
        ) from problem


def _refuse_quantised(path: Path, model: Any) -> None:
    kinds = {node.op_type for node in _nodes(model.graph)}
    kinds |= {node.op_type for function in model.functions for node in function.node}
    found = sorted(kinds & _QUANTISED)
    if found:
        raise ConfigError(
            f"precision is 'fp16', but {path} is quantised already ({', '.join(found)}); "
            "expected 'fp32', which builds it as it is"
        )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _casts_bytes_first(graph: Any) -> bool:
    """Cast uint8 inputs to what they are cast to after they were moved; whether any was.

    On a CPU bytes are best moved before they are cast; TensorRT moves no bytes at all.
    """
    from onnx import TensorProto, helper  # noqa: PLC0415

    changed = False
    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        moved, kinds = _moved(graph, value.name)
        if not moved or len(kinds) != 1:
            continue
        name = f"{value.name}_cast_first"
        for node in graph.node:
            # Those that cast now keep their type: nothing is left to do for them.
            for n, each in enumerate(node.input):
                if each == value.name:
                    node.input[n] = name
        known = [info for info in graph.value_info if info.name in moved]
        for info in known:
            graph.value_info.remove(info)
        kind = next(iter(kinds))
        graph.node.insert(0, helper.make_node("Cast", [value.name], [name], to=kind))
        changed = True
    return changed


def _moved(graph: Any, name: str) -> tuple[set[str], set[int]]:
    """The tensors that are `name` moved about, and the types to which they are then cast.

    No tensors at all if one is used otherwise, or is an output.
    """
    if len(list(_nodes(graph))) > len(graph.node):
        return set(), set()  # Branches and loops may use any tensor of the graph around them.
    outputs = {value.name for value in graph.output}
    moved: set[str] = set()
    kinds: set[int] = set()
    waiting = [name]
    while waiting:
        tensor = waiting.pop()
        if tensor in outputs:
            return set(), set()
        for node in graph.node:
            if tensor not in node.input:
                continue
            if node.op_type == "Cast":
                kinds.add(next(a.i for a in node.attribute if a.name == "to"))
            elif node.op_type in _MOVES and list(node.input).count(tensor) == 1:
                if node.input[0] != tensor:
                    return set(), set()
                moved.add(node.output[0])
                waiting.append(node.output[0])
            else:
                return set(), set()
    return moved, kinds


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:300] + "…"
