"""The inputs of the requests: made by the model's announced signature, or read from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np

from inferq.shared.codec import text_array
from inferq.shared.errors import ConfigError
from inferq.shared.schema import (
    DTYPES,
    Array,
    ModelAdvert,
    TensorSpec,
    check_inputs,
    check_names,
    is_text,
    zeros,
)
from inferq.workers.models.array_files import read_npy, read_npz
from inferq.workers.row_probe.examples import texts

Data = Literal["random", "zeros"]

#: Number of distinct requests, which are sent in turn, and the most bytes that they may have in
#: all.
DISTINCT: Final = 64
MAX_BYTES: Final = 64 * 1024 * 1024
#: Most requests that are cut from files.
MOST_FROM_FILES: Final = 1_000
#: Random whole numbers are below it, so that they fit a byte and any vocabulary.
BELOW: Final = 256
#: Of one element of text, about.
TEXT_BYTES: Final = 64


def read_shapes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The values of ``--shape``, by input. ConfigError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for each in given:
        name, equals, text = each.partition("=")
        sizes = [size.strip() for size in text.split(",")]
        # At most 9 digits each: a larger array cannot be allocated anyway.
        right = all(size.isdecimal() and len(size) < 10 and int(size) for size in sizes)
        if not (name and equals and right):
            raise ConfigError(f"--shape {each!r}; expected NAME=SIZE,SIZE,… as in x=1,224,224,3")
        if name in shapes:
            raise ConfigError(f"--shape {each!r}: {name!r} is given twice; expected once")
        shapes[name] = tuple(map(int, sizes))
    return shapes


def made(
    advert: ModelAdvert,
    shapes: Mapping[str, tuple[int, ...]],
    batch: int | None,
    data: Data,
    seed: int,
) -> list[dict[str, Array]]:
    """Requests of `batch` rows (None: as in `shapes`, else 1) that the model takes. ConfigError."""
    sizes = _sizes(advert, shapes, batch)
    nbytes = sum(
        int(np.prod(sizes[spec.name], dtype=object)) * _element_bytes(spec)
        for spec in advert.signature.inputs
    )
    if nbytes > advert.max_request_bytes:
        raise ConfigError(
            f"a request of model {advert.name!r} would be {nbytes} bytes; "
            f"expected at most {advert.max_request_bytes} (max_request_bytes)"
        )
    random = np.random.default_rng(seed)
    distinct = 1 if data == "zeros" else max(1, min(DISTINCT, MAX_BYTES // max(1, nbytes)))
    return [
        {
            spec.name: _filled(spec, sizes[spec.name], data, random)
            for spec in advert.signature.inputs
        }
        for _ in range(distinct)
    ]


def _element_bytes(spec: TensorSpec) -> int:
    """About; of text, of a sentence."""
    return TEXT_BYTES if is_text(spec.dtype) else DTYPES[spec.dtype].itemsize


def _sizes(
    advert: ModelAdvert, shapes: Mapping[str, tuple[int, ...]], batch: int | None
) -> dict[str, tuple[int, ...]]:
    specs = {spec.name: spec for spec in advert.signature.inputs}
    known: dict[str, int] = {}
    for name, shape in shapes.items():
        spec = specs.get(name)
        if spec is None:
            raise ConfigError(
                f"--shape {name}: model {advert.name!r} has no such input; "
                f"expected one of {', '.join(specs)}"
            )
        if len(shape) != len(spec.shape):
            raise ConfigError(f"--shape {name}: {len(shape)} dims; expected those of {spec}")
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, int) and dim != size:
                raise ConfigError(f"--shape {name}: {size}; expected {dim}, as in {spec}")
            if isinstance(dim, str) and known.setdefault(dim, size) != size:
                raise ConfigError(f"--shape {name}: {dim} is {size}; expected {known[dim]}")
    symbol = advert.signature.batch_symbol if advert.batchable else None
    if symbol is not None:
        if batch is not None and known.setdefault(symbol, batch) != batch:
            raise ConfigError(f"--batch {batch}; expected {known[symbol]}, the rows of --shape")
        known.setdefault(symbol, 1)
    elif batch is not None:
        raise ConfigError(f"--batch {batch}: model {advert.name!r} takes no batches; expected none")
    return {
        name: shapes.get(name) or _resolved(advert, spec, known) for name, spec in specs.items()
    }


def _resolved(advert: ModelAdvert, spec: TensorSpec, known: Mapping[str, int]) -> tuple[int, ...]:
    sizes: list[int] = []
    for axis, dim in enumerate(spec.shape):
        size = dim if isinstance(dim, int) else known.get(dim or "")
        if size is None:
            example = ",".join(str(d) if isinstance(d, int) else str(d or "?") for d in spec.shape)
            raise ConfigError(
                f"input {spec.name!r} of model {advert.name!r}: dim {axis} of {spec} is open; "
                f"expected --shape {spec.name}={example} with a size for it"
            )
        sizes.append(size)
    return tuple(sizes)


def _filled(
    spec: TensorSpec, shape: tuple[int, ...], data: Data, random: np.random.Generator
) -> Array:
    dtype = DTYPES[spec.dtype]
    if data == "zeros":
        return zeros(spec.dtype, shape)
    if is_text(spec.dtype):
        return texts(spec.dtype, shape, random)
    if dtype.kind in "iu":
        return random.integers(0, min(BELOW, np.iinfo(dtype).max + 1), shape).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    return random.random(shape).astype(dtype)


def read(advert: ModelAdvert, given: Sequence[str], batch: int | None) -> list[dict[str, Array]]:
    """Requests from the files of ``--input``: FILE.npz or NAME=FILE.npy. ConfigError.

    With `batch`, the files are cut into requests of so many rows; without, they are one request.
    """
    arrays: dict[str, Array] = {}
    for each in given:
        name, equals, file = each.partition("=")
        if equals and not (name and file):
            raise ConfigError(f"--input {each!r}; expected FILE.npz or NAME=FILE.npy")
        found = {name: read_npy(Path(file))} if equals else read_npz(Path(each))
        for key, array in found.items():
            if key in arrays:
                raise ConfigError(f"--input {each!r}: {key!r} is given twice; expected once")
            arrays[key] = array
    check_names(advert, arrays)
    for spec in advert.signature.inputs:
        if is_text(spec.dtype):
            arrays[spec.name] = text_array(spec.name, arrays[spec.name], spec.dtype)
    if batch is None:
        return [arrays]
    if not advert.batchable:
        raise ConfigError(f"--batch {batch}: model {advert.name!r} takes no batches; expected none")
    rows = min(array.shape[0] if array.ndim else 0 for array in arrays.values())
    if rows < batch:
        raise ConfigError(f"--batch {batch}: --input has {rows} rows; expected at least as many")
    return [
        {name: array[start : start + batch] for name, array in arrays.items()}
        for start in range(0, rows - batch + 1, batch)
    ][:MOST_FROM_FILES]


def check(advert: ModelAdvert, items: Sequence[Mapping[str, Array]]) -> int:
    """The rows of each request. InvalidInput, PayloadTooLarge."""
    rows = [check_inputs(advert, item) for item in items]
    return rows[0]
