"""Inputs of another dtype become the model's where nothing is lost by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inferq.shared.casting import cast_safely
from inferq.shared.errors import InvalidInput
from inferq.shared.schema import ModelAdvert, Signature, TensorSpec


def _advert(dtype: str) -> ModelAdvert:
    inputs = (TensorSpec("x", dtype, ("batch",)),)
    return ModelAdvert(
        name="m", version=1, engine="fake", signature=Signature(inputs, inputs), max_batch_size=4,
        batchable=True, max_queue_depth=0, max_request_bytes=1000, default_priority=0,
        default_timeout_ms=0, seconds_per_row=0.0, casts=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.array([-1, 7], np.int32), "int64"),
        (np.array([-1, 7], np.int64), "int32"),
        (np.array([0, 255], np.int64), "uint8"),
        (np.array([], np.int64), "uint8"),
        (np.array([True]), "int64"),
        (np.array([1.5], np.float16), "float32"),
        (np.array([3], np.uint8), "float32"),
    ],
    ids=str,
)
def test_what_the_models_dtype_holds_is_cast(given: Any, wanted: str) -> None:
    made = cast_safely(_advert(wanted), {"x": given})["x"]
    assert made.dtype == wanted
    assert made.tolist() == given.tolist()


@pytest.mark.parametrize(
    ("given", "wanted", "value"),
    [
        (np.array([1, 2**31]), "int32", "2147483648"),
        (np.array([-1, 3]), "uint64", "-1"),
        (np.array([2**63], np.uint64), "int64", "9223372036854775808"),
    ],
    ids=str,
)
def test_an_integer_that_it_does_not_hold_is_named(given: Any, wanted: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=f"'x': dtype .* holds {value}; expected .* {wanted}"):
        cast_safely(_advert(wanted), {"x": given})


@pytest.mark.parametrize(
    ("given", "wanted"), [(np.array([1.0]), "float32"), (np.array([1.0]), "int64")], ids=str
)
def test_what_may_be_rounded_is_left_for_the_check_to_refuse(given: Any, wanted: str) -> None:
    assert cast_safely(_advert(wanted), {"x": given})["x"] is given
