"""Runs a model once, in this process: for tests of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from inferq.model.answers import read_answer
from inferq.model.base import Context, Model
from inferq.model.declared import signature_of
from inferq.shared.schema import Array, ModelAdvert, Signature, Tensors, check_inputs

_ANY_ROWS: Final = 1 << 30
_ANY_BYTES: Final = 1 << 40


def run_once(
    model: type[Model] | Model,
    inputs: Tensors,
    *,
    folder: Path = Path(),
    config: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """What one request of `inputs` is answered by `model`, checked as a worker does.

    A class is loaded first, with `folder` and `config` in its context; an object is taken as it is.
    InvalidInput: the inputs do not fit its signature. RequestError: what it gave back for one of
    the rows. EngineError: what it gave back does not fit.
    """
    cls = model if isinstance(model, type) else type(model)
    signature = signature_of(cls)
    if isinstance(model, type):
        model = model()
        model.load(Context(folder, "cpu", config or {}))
    batchable = signature.batch_symbol is not None
    rows = check_inputs(_advert(cls.__name__, signature, batchable), inputs)
    outputs, errors = read_answer(
        model.run(dict(inputs)), signature, inputs, rows if batchable else None
    )
    for error in errors.values():
        raise error
    return outputs


def _advert(name: str, signature: Signature, batchable: bool) -> ModelAdvert:
    return ModelAdvert(
        name=name,
        version=1,
        engine="python",
        signature=signature,
        max_batch_size=_ANY_ROWS,
        batchable=batchable,
        max_queue_depth=0,
        max_request_bytes=_ANY_BYTES,
        default_priority=0,
        default_timeout_ms=0,
        seconds_per_row=0.0,
    )
