"""Finds out whether a model is batchable, and writes its signature accordingly.

Files often do not say: converters leave the batch dim of inputs and outputs unnamed, or give each
a name of its own. So dim 0 is batch if all inputs share one symbol there (or leave it unnamed),
and the outputs agree by name or, by measurement, follow the rows: the model is run with 1 and with
`PROBE_ROWS` rows. What is measured wins over what is written. Rows must be independent too, or
one client's answer would depend on its neighbours in the batch: a row that is answered otherwise
in company than alone shows that they are not (that none does is no proof).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from inferq.shared.schema import Array, Signature, Tensors, TensorSpec

logger = logging.getLogger(__name__)

#: Runs the model on these inputs; raises whatever the engine raises.
Probe = Callable[[Tensors], Mapping[str, Array]]

PROBE_ROWS: Final = 3
#: Sizes tried, one after the other, for all dims whose size the file leaves open.
PROBE_SIZES: Final = (32, 224, 8, 128, 1, 2)
#: No probe holds more input elements than this: 256 MB of float32.
MAX_PROBE_ELEMENTS: Final = 1 << 26
#: Share of an output's magnitude by which a row may differ in company. Wide, as dynamically
#: quantised models scale by the largest value of the whole batch.
TOLERANCE: Final = 0.1
#: The batch's name where the file gives none.
BATCH: Final = "batch"

#: What tf2onnx calls a dim that has no name: a new number each time it meets one.
_INVENTED = re.compile(r"unk__\d+")

Dim = int | str | None


@dataclass(frozen=True)
class _Seen:
    """What a probe showed of one output."""

    follows: bool
    dims: int


def with_batch_dim(declared: Signature, probe: Probe) -> Signature:
    """`declared` with one symbol at dim 0 of all inputs and outputs if the model is batchable.

    Otherwise dim 0 of the outputs that do not follow the rows is None (freely varying), or the
    size that the file gives, so that `Signature.batch_symbol` is None. An output that the file
    gives no rank gets that which it was seen to have.
    """
    symbol = _input_symbol(declared)
    if symbol is None:
        if declared.batch_symbol is None:
            return declared
        return Signature(declared.inputs, tuple(_renamed(s, None) for s in declared.outputs))
    inputs = tuple(_renamed(spec, symbol) for spec in declared.inputs)
    seen = _probed(inputs, symbol, probe)
    outputs = tuple(_judged(spec, symbol, seen.get(spec.name)) for spec in declared.outputs)
    return Signature(inputs, outputs)


def _judged(spec: TensorSpec, symbol: str, seen: _Seen | None) -> TensorSpec:
    if seen is None:
        agreed = bool(spec.shape) and spec.shape[0] == symbol
    else:
        agreed = seen.follows
        if not spec.shape and seen.dims:
            spec = TensorSpec(spec.name, spec.dtype, (None,) * seen.dims)
    if agreed:
        return _renamed(spec, symbol)
    fixed = not spec.shape or isinstance(spec.shape[0], int)
    return spec if fixed else _renamed(spec, None)


def why_not_batchable(signature: Signature) -> str | None:
    """Why the model runs request by request; None if it is batchable."""
    if signature.batch_symbol is not None:
        return None
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if not spec.shape:
                return f"{kind} {spec.name!r} is a scalar, without a batch dim"
            if isinstance(spec.shape[0], int):
                return f"dim 0 of {kind} {spec.name!r} is fixed at {spec.shape[0]}"
    symbols = {str(spec.shape[0]) for spec in signature.inputs}
    if len(symbols) > 1:
        return f"dim 0 differs between the inputs ({', '.join(sorted(symbols))})"
    rows = signature.inputs[0].shape[0]
    if any(rows in spec.shape[1:] for spec in signature.inputs):
        return f"dim 0 of the inputs ({rows}) is another dim's size, too"
    for spec in signature.outputs:
        if spec.shape[0] != rows:
            return f"the rows of output {spec.name!r} were not shown to follow those of the inputs"
    return "dim 0 of the inputs has no name"


def _input_symbol(declared: Signature) -> str | None:
    """The symbol of the batch that the inputs allow; None if they cannot be batched."""
    firsts: set[Dim] = set()
    for spec in declared.inputs:
        first = spec.shape[0] if spec.shape else 0
        firsts.add(None if isinstance(first, str) and _INVENTED.fullmatch(first) else first)
    named = firsts - {None}
    if not firsts or len(named) > 1 or any(isinstance(first, int) for first in named):
        return None
    inner = {dim for spec in declared.inputs + declared.outputs for dim in spec.shape[1:]}
    symbol = str(named.pop()) if named else BATCH
    if not firsts - {None} and symbol in inner:
        symbol = "batch_rows"
    return None if symbol in inner else symbol


def _renamed(spec: TensorSpec, first: Dim) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (first, *spec.shape[1:]))


def _probed(inputs: tuple[TensorSpec, ...], symbol: str, probe: Probe) -> dict[str, _Seen]:
    """What was seen of each output; empty if the model could not be run."""
    open_dims = any(not isinstance(dim, int) for spec in inputs for dim in spec.shape[1:])
    for size in PROBE_SIZES if open_dims else PROBE_SIZES[:1]:
        many = _example(inputs, symbol, size)
        if many is None:
            continue
        one = {name: array[:1] for name, array in many.items()}
        try:
            alone, together = probe(one), probe(many)
            follows = {name: _follows(alone[name], together[name]) for name in together}
            if not all(follows.values()):
                again = probe(one)
                for name, good in follows.items():
                    # An output that varies from run to run anyhow shows nothing.
                    if not good and not _same(alone[name], again[name]):
                        follows[name] = _shaped(alone[name], together[name])
        except Exception as problem:  # noqa: BLE001 - a probe that the model rejects tells nothing
            logger.debug("probe of size %d failed: %s", size, problem)
            continue
        return {name: _Seen(good, together[name].ndim) for name, good in follows.items()}
    return {}


def _example(inputs: tuple[TensorSpec, ...], symbol: str, size: int) -> dict[str, Array] | None:
    """Inputs of `PROBE_ROWS` different rows; open dims are `size`. None: too large."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    elements = 0
    for spec in inputs:
        shape = [PROBE_ROWS if dim == symbol else dim if isinstance(dim, int) else size
                 for dim in spec.shape]  # fmt: skip
        elements += int(np.prod(shape, dtype=np.float64))
        if elements > MAX_PROBE_ELEMENTS:
            return None
        dtype = np.dtype(spec.dtype)
        # Small whole numbers are valid as indices, too.
        values = rng.random(shape) if dtype.kind in "fc" else rng.integers(0, 2, shape)
        arrays[spec.name] = values.astype(dtype)
    return arrays


def _shaped(alone: Array, together: Array) -> bool:
    return (
        alone.shape[:1] == (1,)
        and together.shape[:1] == (PROBE_ROWS,)
        and alone.shape[1:] == together.shape[1:]
    )


def _follows(alone: Array, together: Array) -> bool:
    return _shaped(alone, together) and _same(alone, together[:1])


def _same(left: Array, right: Array) -> bool:
    if left.shape != right.shape:
        return False
    if left.dtype.kind not in "fc":
        # A rounding error may turn an index or a flag over: their shape must do.
        return True
    wide = np.complex128 if left.dtype.kind == "c" else np.float64
    a, b = left.astype(wide), right.astype(wide)
    finite = np.abs(a[np.isfinite(a)])
    bound = TOLERANCE * float(finite.max(initial=0.0)) + 1e-6
    return bool(np.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True))
