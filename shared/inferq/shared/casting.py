"""Makes inputs of another dtype those of the model, where nothing is lost by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inferq.shared.errors import InvalidInput
from inferq.shared.schema import DTYPES, Array, ModelAdvert, is_text


def cast_safely(advert: ModelAdvert, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`arrays` of the model's dtypes, as far as these hold all values of the arrays' own dtypes.

    Integers may be of any dtype that holds those which are there: InvalidInput names one that it
    does not hold. Whatever else is of another dtype stays as it is.
    """
    made = dict(arrays)
    for spec in advert.signature.inputs + advert.signature.optional:
        array, wanted = arrays.get(spec.name), DTYPES[spec.dtype]
        if array is not None and array.dtype != wanted and not is_text(spec.dtype):
            made[spec.name] = _cast(spec.name, array, wanted)
    return made


def _cast(name: str, array: Array, wanted: np.dtype[Any]) -> Array:
    if np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted)
    if array.dtype.kind not in "iu" or wanted.kind not in "iu":
        return array
    info = np.iinfo(wanted)
    if array.size:
        for value in (int(array.min()), int(array.max())):
            if not info.min <= value <= info.max:
                raise InvalidInput(
                    f"input {name!r}: dtype {array.dtype.name}, and holds {value}; "
                    f"expected what {wanted.name} holds"
                )
    return array.astype(wanted)
