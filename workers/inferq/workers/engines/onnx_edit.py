"""Opens ONNX files with less in them than they hold: without ZipMap, and without other outputs.

skl2onnx and others end a classifier with ZipMap, which makes a map of label → probability of each
row. A sequence of maps is no tensor; what goes into ZipMap is, with a column for each label.

ONNX Runtime computes the whole graph, whichever outputs a run asks for. So what only leads to other
outputs is taken out of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

MAPS: Final = "seq(map("
#: Larger files are served as they are: to edit one takes twice its memory.
MAX_EDITED_BYTES: Final = 1 << 30
#: Of a session's options: where the weights are that stand in files of their own.
WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"


def read(path: Path) -> Any | None:
    """The model in `path`, to be edited; None: it is too large for that."""
    if path.stat().st_size > MAX_EDITED_BYTES:
        return None
    # Imported only here: few models need it, and it takes its time.
    import onnx  # noqa: PLC0415

    return onnx.load(path, load_external_data=False)


def keep_outputs(model: Any, names: Collection[str]) -> None:
    """Drop all outputs but those of these `names`, and the nodes that only lead to others."""
    graph = model.graph
    kept = [output for output in graph.output if output.name in names]
    del graph.output[:]
    graph.output.extend(kept)
    needed = set(names)
    nodes = []
    for node in reversed(graph.node):  # nodes stand behind those that they take from
        if needed.intersection(node.output):
            needed.update(_taken(node))
            nodes.append(node)
    nodes.reverse()
    del graph.node[:]
    graph.node.extend(nodes)


def _taken(node: Any) -> Iterator[str]:
    """All names that a node takes from, those in the graphs inside of it among them."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from _taken(inner)


def take_maps_out(model: Any) -> tuple[str, ...]:
    """Put tensors in place of the maps that ZipMap makes; the labels of their columns."""
    import onnx  # noqa: PLC0415

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    labels: tuple[str, ...] = ()
    for output in graph.output:
        maker = makers.get(output.name)
        if maker is None or maker.op_type != "ZipMap":
            continue
        labels = _labels(maker)
        maker.op_type, maker.domain = "Identity", ""
        del maker.attribute[:]
        shape = [None, len(labels)]
        tensor = onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, shape)
        output.CopyFrom(tensor)
    return labels


def _labels(zip_map: Any) -> tuple[str, ...]:
    for attribute in zip_map.attribute:
        if attribute.name == "classlabels_strings" and attribute.strings:
            return tuple(label.decode(errors="replace") for label in attribute.strings)
        if attribute.name == "classlabels_int64s" and attribute.ints:
            return tuple(map(str, attribute.ints))
    return ()
