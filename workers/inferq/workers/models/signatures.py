"""Finds out whether a model is batchable, and writes its signature accordingly.

Files often do not say: converters leave the batch dim of inputs and outputs unnamed, or give each a
different name. So dim 0 is the batch if all inputs share one symbol there (or leave it unnamed),
and if measurements show that the outputs follow the rows: measurements win over names. Rows must
also be independent, or one client's answer would depend on its neighbours in the batch
(`row_probe`). A model that was not shown to be so runs request by request, unless model.toml says
otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Signature, TensorSpec
from inferq.workers.row_probe.agreement import Difference
from inferq.workers.row_probe.rows import NotShown, Probe, Shown, show

#: The batch's name if the file gives none.
BATCH: Final = "batch"

#: Names that mean "no name": two dims with such a name need not have the same size. So do signs
#: alone and negative numbers.
_NAMELESS = re.compile(
    r"[\W_]*|[+-]?\d+|none|null|nil|nan|any|unk|unknown|undef|undefined|unnamed|unspecified"
    r"|dyn|dynamic|free|var|variable|variadic",
    re.IGNORECASE,
)
#: tf2onnx's name for a dim without a name, with a new number each time.
_UNKNOWN = re.compile(r"unk__\d+")
#: Such names of tf2onnx, PyTorch and Paddle. If two differ, their sizes may still be the same.
_INVENTED = re.compile(r"unk__\d+|.*_dynamic_axes_\d+|DynamicDimension\.\d+")

Dim = int | str | None


@dataclass(frozen=True)
class Declared:
    """What a model's file says of the model, and a function that runs it."""

    signature: Signature
    #: Runs the model; None: what the file says is true.
    probe: Probe | None = None
    #: Outputs that cannot be served, which `signature` lacks → why.
    unserved: Mapping[str, str] = field(default_factory=dict)
    #: What its classes are called, if the file says so.
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examined:
    """The result: the signature to serve a model by."""

    signature: Signature
    #: Why it runs request by request; None: requests share batches.
    why_not_batchable: str | None
    #: A remark for the operator.
    remark: str | None = None


def named(dim: Dim) -> Dim:
    """The dim `dim` of a file; None if its name means "no name"."""
    return None if isinstance(dim, str) and _NAMELESS.fullmatch(dim) else dim


def how_to_name(name: str, axis: int) -> str:
    """How to name the dim `axis` of the input `name`, which has no name."""
    return (
        f"dim {axis} of input {name!r} has no name; give it one in the file, by the package onnx: "
        f"model.graph.input[…].type.tensor_type.shape.dim[{axis}].dim_param = 'height'"
    )


def examine(  # noqa: C901 - a table of cases
    declared: Declared, batchable: bool | None = None, known: Mapping[str, int] | None = None
) -> Examined:
    """The signature of a model, with one symbol at dim 0 of all tensors if it is batchable.

    `batchable`: model.toml's value; None: it has none. `known`: symbol → a size that it may have.
    ConfigError if model.toml says that it is batchable, and it has no rows.
    """
    signature = declared.signature
    if batchable is False:
        return Examined(signature, "model.toml says batchable = false")
    symbol = _input_symbol(signature)
    if symbol is None:
        return _unbatched(signature, _why_no_batch(signature), batchable)
    inputs = [_renamed(spec, symbol) for spec in signature.inputs]
    shown: Shown | None = None
    if declared.probe is not None:
        try:
            shown = show(inputs, known or {}, declared.probe)
        except NotShown as problem:
            if not batchable:
                why = f"{_NOT_TRIED} ({_short(str(problem))}); {_SAY_SO}"
                return _unbatched(signature, _why_apart(signature) or why, batchable)
    if shown is None:
        apart = _why_apart(signature)
        return _unbatched(signature, apart, batchable) if apart else _batched(signature, symbol)
    signature = _with_ranks(signature, shown)
    if shown.unbatched:
        return _unbatched(*_open_unbatched(signature, shown), batchable)
    varying = _varying(shown.varying) if shown.varying else None
    if not shown.differences:
        if varying is not None and not batchable:
            return _unbatched(signature, f"{varying}; {_IF_ACCEPTABLE}", batchable)
        return _batched(signature, symbol, varying)
    depends = _depends(shown.differences)
    if batchable:
        remark = f"model.toml says so, though {depends}; audits do as on_mismatch says"
        return _batched(signature, symbol, remark)
    return _unbatched(signature, f"{depends}; {_IF_ACCEPTABLE}", batchable)


_NOT_TRIED: Final = "no example could be run to see whether its rows are independent"
_SAY_SO: Final = (
    "if they are, write batchable = true in model.toml, or [profile] with sizes that it takes"
)
_IF_ACCEPTABLE: Final = (
    "if that is acceptable, batchable = true in model.toml has them batched, with "
    'on_mismatch = "warn" beside it'
)
_MAX_REASON_CHARS: Final = 200


def _batched(signature: Signature, symbol: str, remark: str | None = None) -> Examined:
    inputs, outputs = (
        tuple(_renamed(spec, symbol) for spec in specs)
        for specs in (signature.inputs, signature.outputs)
    )
    return Examined(replace(signature, inputs=inputs, outputs=outputs), None, remark)


def _unbatched(signature: Signature, reason: str, batchable: bool | None) -> Examined:
    if batchable:
        raise ConfigError(f"batchable is true; expected false, or none, since {reason}")
    return Examined(signature, reason)


def _renamed(spec: TensorSpec, first: Dim) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (first, *spec.shape[1:]))


# --- what the file says ------------------------------------------------------------------------


def _input_symbol(declared: Signature) -> str | None:
    """The batch symbol by the inputs; None if they cannot be batched."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in declared.inputs}
    invented = _INVENTED if len(firsts) > 1 else _UNKNOWN
    given = {
        first for first in firsts if not (isinstance(first, str) and invented.fullmatch(first))
    } - {None}
    if not firsts or len(given) > 1 or any(isinstance(first, int) for first in given):
        return None
    inner = {dim for spec in declared.inputs + declared.outputs for dim in spec.shape[1:]}
    if given:
        symbol = str(given.pop())
        return None if symbol in inner else symbol
    return BATCH if BATCH not in inner else f"{BATCH}_rows"


def _why_no_batch(signature: Signature) -> str:
    """Why `_input_symbol` is None."""
    for spec in signature.inputs:
        if not spec.shape:
            return f"input {spec.name!r} is a scalar, without a batch dim"
        if isinstance(spec.shape[0], int):
            return f"dim 0 of input {spec.name!r} is fixed at {spec.shape[0]}"
    symbols = {str(spec.shape[0]) for spec in signature.inputs}
    if len(symbols) > 1:
        return f"dim 0 differs between the inputs ({', '.join(sorted(symbols))})"
    return f"dim 0 of the inputs ({symbols.pop()}) is another dim's size, too"


def _why_apart(signature: Signature) -> str | None:
    """Why, by the file, the outputs cannot follow the rows; None if they may."""
    for spec in signature.outputs:
        if not spec.shape:
            return f"output {spec.name!r} is a scalar, without a batch dim"
        if isinstance(spec.shape[0], int):
            return f"dim 0 of output {spec.name!r} is fixed at {spec.shape[0]}"
    return None


# --- what was seen -----------------------------------------------------------------------------


def _with_ranks(signature: Signature, shown: Shown) -> Signature:
    """`signature` with the measured ranks of outputs for which the file gives none."""
    outputs = tuple(
        spec if spec.shape else TensorSpec(spec.name, spec.dtype, (None,) * shown.dims[spec.name])
        for spec in signature.outputs
    )
    return replace(signature, outputs=outputs)


def _open_unbatched(signature: Signature, shown: Shown) -> tuple[Signature, str]:
    """`signature` with dim 0 of outputs that do not follow the rows open, and why."""
    specs = {spec.name: spec for spec in signature.outputs}
    name, seen = next(iter(shown.unbatched.items()))
    spec = specs[name]
    if not spec.shape:
        why = f"output {name!r} is a scalar, without a batch dim"
    elif isinstance(spec.shape[0], int):
        why = f"dim 0 of output {name!r} is fixed at {spec.shape[0]}"
    else:
        why = f"the rows of output {name!r} do not follow those of the inputs: {seen}"
    outputs = tuple(
        _renamed(spec, None)
        if spec.name in shown.unbatched and spec.shape and not isinstance(spec.shape[0], int)
        else spec
        for spec in signature.outputs
    )
    return replace(signature, outputs=outputs), why


def _depends(differences: Sequence[Difference]) -> str:
    """How rows depend on each other, in words."""
    most = max(differences, key=lambda each: each.share)
    share = f" ({100 * most.share:.3g} %)" if math.isfinite(most.share) else ""
    cosines = [each.cosine for each in differences if each.cosine is not None]
    between = f", cosine {min(cosines):.6g} to {max(cosines):.6g}" if cosines else ""
    return (
        f"answers depend on the rows beside them: output {most.output!r} of a row differs "
        f"{most.what}{share}{between}"
    )


def _varying(names: Sequence[str]) -> str:
    named = ", ".join(map(repr, names))
    return f"its outputs vary from run to run ({named}), so that only shapes could be compared"


def _short(problem: str) -> str:
    text = " ".join(problem.split())
    return text if len(text) <= _MAX_REASON_CHARS else text[:_MAX_REASON_CHARS] + "…"
