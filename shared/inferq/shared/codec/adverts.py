"""Reads and writes adverts: what workers announce of the models that they serve."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from inferq.shared.errors import ConfigError
from inferq.shared.schema import DTYPES, MAX_DIMS, ModelAdvert

_advert_decoder = msgspec.msgpack.Decoder(ModelAdvert)
encode_advert: Callable[[ModelAdvert], bytes] = msgspec.msgpack.Encoder().encode


def decode_advert(data: bytes) -> ModelAdvert:
    """What a worker announced. ConfigError if another version, or another program, wrote it."""
    try:
        advert = _advert_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise ConfigError(f"a model's announcement cannot be read: {problem}") from problem
    problem_found = _contradiction(advert)
    if problem_found:
        raise ConfigError(f"the announcement of model {advert.name[:100]!r} has {problem_found}")
    return advert


def _contradiction(advert: ModelAdvert) -> str | None:
    """Why requests cannot be checked against `advert`; None: they can."""
    signature = advert.signature
    if not signature.inputs:
        return "no inputs"
    for spec in signature.inputs + signature.optional:
        if spec.dtype not in DTYPES:
            return (
                f"input {spec.name[:100]!r} of dtype {spec.dtype[:40]!r}; expected one of "
                f"{', '.join(DTYPES)}: a newer version of inferq may know it"
            )
        if len(spec.shape) > MAX_DIMS:
            return f"input {spec.name[:100]!r} of {len(spec.shape)} dims"
    for spec in signature.inputs + signature.outputs:
        if spec.batch_axis and not 0 <= spec.batch_axis < len(spec.shape):
            return (
                f"{spec.name[:100]!r} of {len(spec.shape)} dims, whose rows are {spec.batch_axis}"
            )
    if advert.batchable and advert.signature.batch_symbol is None:
        return "batchable = true, and no symbol that dim 0 of every tensor shares"
    return None
