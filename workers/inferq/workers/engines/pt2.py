"""Looks into a .pt2 archive, without PyTorch, for what would execute code when it is loaded.

A .pt2 is an uncompressed ZIP of one folder: the graph as JSON (``models/model.json``), weights and
constants as raw bytes with a JSON table each, and examples of inputs as PyTorch's own pickle.
Source: ``torch.export.pt2_archive`` of PyTorch 2.9 to 2.13. This keeps code out that is there by
accident or of old habit; it is no fence against a forged file (see `torch`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

from inferq.shared.errors import ConfigError

#: More weights than any machine holds that this engine suits; also unpacked.
MAX_PT2_BYTES: Final = 64 << 30
#: Of each of its tables and of the examples, which are read whole.
MAX_PART_BYTES: Final = 1 << 30
MAX_PARTS: Final = 100_000

MODEL: Final = "models/model.json"
_EXAMPLES: Final = "data/sample_inputs/model.pt"
_TABLES: Final = (
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_COMPILED: Final = "data/aotinductor/"
#: A constant's file: raw bytes, or else an object.
_TENSOR: Final = ("tensor_", "weight_")


def check_archive(path: Path, is_plain_data: Callable[[IO[bytes]], bool]) -> None:
    """ConfigError, with the reason, unless `path` is an archive of one graph and plain tensors.

    `is_plain_data` tells whether examples of inputs are read without executing what they hold.
    """
    size = path.stat().st_size
    if size > MAX_PT2_BYTES:
        raise ConfigError(f"{path} has {size} bytes; expected at most {MAX_PT2_BYTES}")
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _problem(archive, is_plain_data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is no .pt2 archive ({error}); expected what torch.export.save writes"
        ) from error
    if problem is not None:
        raise ConfigError(f"{path} {problem}")


def _problem(archive: zipfile.ZipFile, is_plain_data: Callable[[IO[bytes]], bool]) -> str | None:
    infos = archive.infolist()
    if len(infos) > MAX_PARTS:
        return f"has {len(infos)} parts; expected at most {MAX_PARTS}"
    unpacked = sum(info.file_size for info in infos)
    if unpacked > MAX_PT2_BYTES:
        return f"has {unpacked} bytes unpacked; expected at most {MAX_PT2_BYTES}"
    parts = {info.filename.partition("/")[2] or info.filename: info for info in infos}
    if len(parts) < len(infos):
        return "holds a part twice; expected each once"
    if MODEL not in parts:
        old = "serialized_exported_program.json" in parts
        return (
            "is in the format of PyTorch before 2.8; expected it saved anew by torch.export.save"
            if old
            else f"holds no {MODEL}; expected what torch.export.save writes of one program"
        )
    return _problem_of_parts(archive, parts, is_plain_data)


def _problem_of_parts(
    archive: zipfile.ZipFile,
    parts: Mapping[str, zipfile.ZipInfo],
    is_plain_data: Callable[[IO[bytes]], bool],
) -> str | None:
    for name in parts:
        if name.startswith(_COMPILED):
            return f"holds compiled code ({name}); expected torch.export.save without AOTInductor"
        if name.startswith("models/") and name != MODEL:
            return f"holds {name} beside {MODEL}; expected one program"
    for table in _TABLES:
        for tensor, entry in json.loads(_read(archive, parts[table]))["config"].items():
            if entry["use_pickle"] or not entry["path_name"].startswith(_TENSOR):
                return f"holds {tensor!r} as a pickled object; expected plain tensors"
    examples = parts.get(_EXAMPLES)
    if examples is not None and examples.file_size:
        file = io.BytesIO(_read(archive, examples))
        if not is_plain_data(file):
            return "holds examples of inputs other than plain tensors; expected none other"
    return None


def _read(archive: zipfile.ZipFile, info: Any) -> bytes:
    if info.file_size > MAX_PART_BYTES:
        raise ValueError(f"{info.filename} has {info.file_size} bytes")
    return archive.read(info)
