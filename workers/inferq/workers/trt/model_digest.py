"""The digest of a model's file and of all that it names: what a plan was built from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inferq.shared.errors import ConfigError


def model_digest(path: Path) -> str:
    """SHA-256 of the ONNX file `path` and of the external data that it names.

    Raises ConfigError: a file is missing or unreadable, or lies outside the model's folder.
    """
    total = hashlib.sha256()
    for each in [path, *_external_files(path)]:
        try:
            with each.open("rb") as file:
                part = hashlib.file_digest(file, "sha256")
        except OSError as problem:
            raise ConfigError(f"{each} cannot be read: {problem.strerror}") from problem
        total.update(part.digest())
    return total.hexdigest()


def _external_files(path: Path) -> list[Path]:
    import onnx  # noqa: PLC0415 (heavy)

    try:
        model = onnx.load(path, load_external_data=False)
    # Whatever protobuf or onnx raise for a file that is no model.
    except Exception as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ConfigError(f"{path} cannot be read as ONNX: {reason}") from problem
    folder = path.parent.resolve()
    found: dict[str, Path] = {}
    for tensor in _tensors(model.graph, model.functions):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in found:
                place = (folder / entry.value).resolve()
                if not place.is_relative_to(folder):
                    raise ConfigError(
                        f"{path} keeps data in {entry.value!r}; expected a file in its folder"
                    )
                found[entry.value] = place
    return [found[name] for name in sorted(found)]


def _tensors(graph: Any, functions: Any = ()) -> Iterator[Any]:
    """All constants of `graph`, whose data may be external."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    nodes = [*graph.node, *(node for function in functions for node in function.node)]
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
