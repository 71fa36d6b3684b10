"""Holds what `Model.run` gave back against the signature, and makes arrays of it.

Two forms are taken: output → array, or one entry for each row, a mapping or a RequestError. An
array must have the very dtype; a list, and a row's number, become it where no value changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from inferq.shared.errors import EngineError, RequestError
from inferq.shared.schema import DTYPES, Array, Signature, Tensors, TensorSpec

#: What the elements of object arrays are, by dtype.
_ELEMENTS: Final = {"string": str, "bytes": bytes}
_SHOWN_CHARS: Final = 100


class WrongRows(EngineError):
    """An output has another number of rows than the inputs."""


def read_answer(
    answer: object, signature: Signature, inputs: Tensors, rows: int | None
) -> tuple[dict[str, Array], dict[int, RequestError]]:
    """The outputs, and row → error of those rows that have one; no outputs if all of them have.

    `rows` of the inputs; None: the model is not batchable. RequestError: the whole batch has it.
    EngineError (WrongRows, where that is what is wrong): naming output, what it is and what was
    expected.
    """
    if isinstance(answer, RequestError):
        raise answer
    errors: dict[int, RequestError] = {}
    if isinstance(answer, list | tuple) and rows is not None:
        answer, errors = _joined(answer, signature, rows)
        if len(errors) == rows:
            return {}, errors
    if not isinstance(answer, Mapping):
        other = "" if rows is None else ", or a list with an entry for each row"
        raise EngineError(f"run gave back {_short(answer)}; expected output name → array{other}")
    _check_names(answer, signature)
    sizes = _sizes(signature, inputs)
    outputs: dict[str, Array] = {}
    for spec in signature.outputs:
        array = _array(answer[spec.name], spec)
        _check_shape(array.shape, spec, rows, sizes)
        outputs[spec.name] = array
    return outputs, errors


def _joined(
    entries: Sequence[Any], signature: Signature, rows: int
) -> tuple[dict[str, Array], dict[int, RequestError]]:
    """Entries of rows as arrays; a row with an error has what the first without has."""
    if len(entries) != rows:
        raise WrongRows(
            f"run gave back a list of {len(entries)} entries; expected {rows}, one for each row"
        )
    errors = {row: each for row, each in enumerate(entries) if isinstance(each, RequestError)}
    if len(errors) == rows:
        return {}, errors
    for row, each in enumerate(entries):
        if row in errors:
            continue
        if not isinstance(each, Mapping):
            raise EngineError(
                f"run gave back {_short(each)} for row {row}; expected output name → value, or a "
                "RequestError"
            )
        _check_names(each, signature, f" of row {row}")
    filling = next(each for row, each in enumerate(entries) if row not in errors)
    whole = [filling if row in errors else each for row, each in enumerate(entries)]
    return {
        spec.name: _stacked([each[spec.name] for each in whole], spec) for spec in signature.outputs
    }, errors


def _stacked(values: Sequence[Any], spec: TensorSpec) -> Array:
    if len(spec.shape) == 1 and spec.dtype in _ELEMENTS:
        return _objects(list(values), spec)
    arrays = [_array(value, spec) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise EngineError(
            f"output {spec.name!r} has rows of the shapes {sorted(map(list, shapes))[:4]}; "
            f"expected one, as in {spec}"
        )
    return np.stack(arrays)


def _check_names(answer: Mapping[Any, Any], signature: Signature, where: str = "") -> None:
    names = [spec.name for spec in signature.outputs]
    if answer.keys() != set(names):
        given = [_short(name) for name in answer][: len(names) + 8]
        raise EngineError(
            f"outputs{where} are [{', '.join(given)}]; expected [{', '.join(map(repr, names))}]"
        )


# --- dtypes --------------------------------------------------------------------------------------


def _array(value: object, spec: TensorSpec) -> Array:
    if spec.dtype in _ELEMENTS:
        return _objects(value, spec)
    dtype = DTYPES[spec.dtype]
    if hasattr(value, "__array__") and not isinstance(value, np.generic):
        array = np.asarray(value)
        if array.dtype.newbyteorder("=") != dtype.newbyteorder("="):
            raise EngineError(
                f"output {spec.name!r} is {array.dtype.name}; expected {spec.dtype} "
                f"(array.astype({spec.dtype!r}) makes it so)"
            )
        # Its bytes are read as little-endian from here on.
        return array if array.dtype == dtype else array.astype(dtype)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as problem:
        raise EngineError(
            f"output {spec.name!r} is {_short(value)}; expected an array of {spec.dtype}: {problem}"
        ) from None
    if array.dtype == dtype:
        return array
    if array.size == 0:
        return array.astype(dtype)
    if not _kinds_fit(array.dtype.kind, dtype.kind):
        raise EngineError(f"output {spec.name!r} is {_short(value)}; expected {spec.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        made: Array = array.astype(dtype)
    changed = made != array if dtype.kind in "iu" else np.isinf(made) & ~np.isinf(array)
    if dtype.kind in "iufc" and bool(changed.any()):
        raise EngineError(
            f"output {spec.name!r} holds {array[changed].flat[0]}; expected what {spec.dtype} holds"
        )
    return made


def _kinds_fit(given: str, wanted: str) -> bool:
    """Whether numbers of a list may become it: whole ones any, others no whole ones."""
    return given in {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "c": "iufc"}[wanted]


def _objects(value: object, spec: TensorSpec) -> Array:
    """An object array of str or bytes."""
    kind = _ELEMENTS[spec.dtype]
    array = np.asarray(value, dtype=object)
    for each in array.flat:
        if not isinstance(each, kind):
            raise EngineError(
                f"output {spec.name!r} holds {_short(each)}; expected {kind.__name__} alone, "
                f"as in {spec}"
            )
    return array


# --- shapes --------------------------------------------------------------------------------------


def _sizes(signature: Signature, inputs: Tensors) -> dict[str, int]:
    """Symbol → its size in this batch."""
    return {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.shape, inputs[spec.name].shape, strict=False)
        if isinstance(dim, str)
    }


def _check_shape(
    shape: tuple[int, ...], spec: TensorSpec, rows: int | None, sizes: dict[str, int]
) -> None:
    name, told = spec.name, list(shape)
    if len(shape) != len(spec.shape):
        raise EngineError(
            f"output {name!r} has the shape {told}; expected {len(spec.shape)} dims, as in {spec}"
        )
    if rows is not None and shape[0] != rows:
        raise WrongRows(f"output {name!r} has {shape[0]} rows; expected {rows}, as the inputs")
    for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
        expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        if expected is not None and size != expected:
            raise EngineError(
                f"output {name!r} has the shape {told}; expected {expected} at dim {axis}, "
                f"as in {spec}"
            )


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - an object of others' may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
