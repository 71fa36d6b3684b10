"""A repository as it is met with: a good model, and each kind of folder that cannot be served."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import helper

from helpers import onnx_models
from helpers.repository import fake_model

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def file(root: Path, model: str, version: int = 1) -> Path:
    return root / model / str(version) / "model.onnx"


def good(root: Path, model: str, version: int = 1) -> Path:
    """A doubling model float32[batch, 3]."""
    return onnx_models.double(file(root, model, version))


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cut(path: Path, part: float = 0.5) -> None:
    """Leave the first `part` of a file, as a copy does that has not ended."""
    os.truncate(path, int(path.stat().st_size * part))


def far_lookup(path: Path) -> Path:
    """A model that zeros cannot be run through: its table is too small for them."""
    table = helper.make_tensor("table", onnx_models.FLOAT, [4, 2], [0.0] * 8)
    nodes = [
        onnx_models.node("Add", ["ids", "far"], ["there"]),
        onnx_models.node("Gather", ["table", "there"], ["y"], axis=0),
    ]
    return onnx_models.write(
        path,
        nodes,
        {"ids": (onnx_models.INT64, (1,))},
        {"y": (onnx_models.FLOAT, (1, 2))},
        [table, onnx_models.ints("far", [1], [100])],
    )


def weights(path: Path, *, rows: int) -> Path:
    """A model float32[batch, 4] whose 4 weights stand in weights.bin, of which `rows` are there."""
    onnx_models.external(path, "weights.bin")
    np.arange(rows, dtype=np.float32).tofile(path.parent / "weights.bin")
    return path


def _unknown_operator(root: Path, model: str) -> None:
    shape = ("batch", 3)
    onnx_models.write(
        file(root, model),
        [onnx_models.node("Imaginary", "x", "y")],
        {"x": (onnx_models.FLOAT, shape)},
        {"y": (onnx_models.FLOAT, shape)},
    )


def _half(root: Path, model: str) -> None:
    cut(good(root, model))


def _missing_weights(root: Path, model: str) -> None:
    (weights(file(root, model), rows=4).parent / "weights.bin").unlink()


def _misplaced(root: Path, model: str) -> None:
    onnx_models.double(root / model / "model.onnx")


def _for_cuda(root: Path, model: str) -> None:
    good(root, model)
    put(root / model / "model.toml", b"[onnxruntime]\nprovider = 'cuda'")


@dataclass(frozen=True)
class Bad:
    """One kind of model that cannot be served."""

    write: Callable[[Path, str], object]
    #: Part of what is said of it.
    reason: str


#: By the folder's name.
BAD: Mapping[str, Bad] = {
    "broken": Bad(lambda r, m: put(file(r, m), b"no model"), "is no whole ONNX file"),
    "operator": Bad(_unknown_operator, "cannot be loaded by ONNX Runtime"),
    "empty-version": Bad(lambda r, m: (r / m / "1").mkdir(parents=True), "no model in "),
    "empty-file": Bad(lambda r, m: put(file(r, m), b""), "model.onnx is empty"),
    "half-copied": Bad(_half, "is no whole ONNX file: it has "),
    "half-weights": Bad(
        lambda r, m: weights(file(r, m), rows=3), "weights.bin has 12 bytes; expected 16"
    ),
    "no-weights": Bad(_missing_weights, "weights.bin is missing"),
    "pointer": Bad(lambda r, m: put(file(r, m), LFS_POINTER.encode()), "is a git-lfs pointer"),
    "archive": Bad(
        lambda r, m: put(r / m / "1" / "model.pt2", b"PK\x03\x04"), "no whole .pt2 archive"
    ),
    "knob": Bad(lambda r, m: fake_model(r, m, knobs="lane = 3"), "lane is not a known key"),
    "toml": Bad(lambda r, m: put(r / m / "model.toml", b"= ="), "not TOML"),
    "engine": Bad(
        lambda r, m: put(r / m / "model.toml", b"engine = 'tensorflow'"), "engine is 'tensorflow'"
    ),
    "misplaced": Bad(_misplaced, "in no version's folder"),
    "my model": Bad(good, "model name is 'my model'; expected letters"),
    # The build of ONNX Runtime that the tests install has no CUDA.
    "cuda": Bad(_for_cuda, "onnxruntime.provider is 'cuda'"),
    "zeros": Bad(lambda r, m: far_lookup(file(r, m)), "cannot run zeros to warm up"),
}
#: Those of which only a worker finds out, which loads them.
FOUND_LATE = frozenset({"cuda", "zeros"})
#: Those that no queue can be called by.
MISNAMED = frozenset({"my model"})
#: Folders that hold no model.
OTHERS = ("__pycache__", "docs", "empty", "lost+found")

#: Newest version that is not complete → part of what is said of it. Version 1 is good.
NEWEST: Mapping[str, Bad] = {
    "newest-empty": Bad(lambda r, m: (r / m / "2").mkdir(parents=True), "no model in "),
    "newest-half": Bad(lambda r, m: cut(good(r, m, 2)), "is no whole ONNX file"),
    "newest-weights": Bad(lambda r, m: weights(file(r, m, 2), rows=2), "has 8 bytes; expected 16"),
    "newest-pointer": Bad(
        lambda r, m: put(file(r, m, 2), LFS_POINTER.encode()), "is a git-lfs pointer"
    ),
}


def write_others(root: Path) -> None:
    """Folders and files that are no models, and a model that is hidden."""
    for name in OTHERS:
        (root / name).mkdir(parents=True)
    put(root / "docs" / "index.md", b"# Models")
    put(root / "__pycache__" / "x.cpython-311.pyc", b"")
    put(root / "README.md", b"# Models")
    good(root, ".hidden")


def write_all(root: Path) -> None:
    """All of it, and the good model "good"."""
    good(root, "good")
    for name, each in BAD.items():
        each.write(root, name)
    for name, each in NEWEST.items():
        good(root, name)
        each.write(root, name)
    write_others(root)
