"""A request's inputs are checked alike at the caller and in the worker, and by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.shared.errors import InferqError, InvalidInput, PayloadTooLarge
from inferq.shared.schema import (
    Array,
    InputCheck,
    ModelAdvert,
    Signature,
    TensorSpec,
    check_inputs,
    describe,
    nbytes,
)


def spec(name: str, dtype: str, *shape: int | str | None) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def advert(*inputs: TensorSpec, batchable: bool = True, **given: Any) -> ModelAdvert:
    fields: dict[str, Any] = {
        "name": "m", "version": 1, "engine": "fake", "signature": Signature(inputs, inputs),
        "max_batch_size": 4, "batchable": batchable, "max_queue_depth": 0,
        "max_request_bytes": 1000, "default_priority": 0, "default_timeout_ms": 0,
        "seconds_per_row": 0.0,
    }  # fmt: skip
    return ModelAdvert(**{**fields, **given})


PLAIN = advert(spec("x", "float32", "batch", 3))
PAIR = advert(spec("a", "float32", "batch", 2), spec("b", "int64", "batch", "n"))
SAME_N = advert(spec("a", "float32", "batch", "n"), spec("b", "float32", "batch", "n"))
SMALL = advert(*PLAIN.signature.inputs, max_request_bytes=20)
FREE = advert(spec("x", "float32", None, None), batchable=False)
FIXED = advert(spec("x", "float32", 1, 3), batchable=False)


def f4(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("model", "inputs", "rows"),
    [
        (PLAIN, {"x": f4(1, 3)}, 1),
        (PLAIN, {"x": f4(4, 3)}, 4),
        (PLAIN, {"x": np.zeros((2, 3), ">f4")}, 2),
        (PAIR, {"a": f4(2, 2), "b": np.zeros((2, 7), np.int64)}, 2),
        (SAME_N, {"a": f4(1, 5), "b": f4(1, 5)}, 1),
        (FREE, {"x": f4(7, 9)}, 1),
        (FREE, {"x": f4(7, 0)}, 1),
        (PAIR, {"a": f4(2, 2), "b": np.zeros((2, 0), np.int64)}, 2),
        (FIXED, {"x": f4(1, 3)}, 1),
    ],
)
def test_inputs_that_fit_have_so_many_rows(
    model: ModelAdvert, inputs: dict[str, Array], rows: int
) -> None:
    assert check_inputs(model, inputs) == InputCheck(model)(inputs) == rows


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (PLAIN, {}, ["missing 'x'", "x: float32[batch, 3]"]),
        (PLAIN, {"y": f4(1, 3)}, ["missing 'x'", "unknown 'y'"]),
        (PLAIN, {"x": f4(1, 3), "y": f4(1)}, ["unknown 'y'"]),
        (PLAIN, {"x": np.zeros((1, 3))}, ["'x'", "float64", "expected float32"]),
        (PLAIN, {"x": f4(3)}, ["'x'", "[3] has 1 dims", "batch, 3"]),
        (PLAIN, {"x": f4(1, 4)}, ["'x'", "4 at dim 1", "expected 3"]),
        (PLAIN, {"x": f4(0, 3)}, ["'x'", "dim 0", "at least 1"]),
        (PLAIN, {"x": f4(5, 3)}, ["5 rows", "1 to 4"]),
        (PAIR, {"a": f4(2, 2), "b": np.zeros((1, 7), np.int64)}, ["'b'", "is 1; expected 2"]),
        (SAME_N, {"a": f4(1, 5), "b": f4(1, 6)}, ["'b'", "(n) is 6; expected 5", "'a'"]),
        (FIXED, {"x": f4(2, 3)}, ["2 at dim 0", "expected 1"]),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_value_and_expectation(
    model: ModelAdvert, inputs: dict[str, Array], words: list[str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        InputCheck(model)(inputs)
    for word in words:
        assert word in str(caught.value)
    rows = {"rows": 5, "limit": 4} if "5 rows" in words else {}
    assert caught.value.detail == {"model": "m", **rows}


def test_too_large_a_request_names_size_and_limit() -> None:
    inputs = {"x": f4(4, 3)}
    assert InputCheck(advert(PLAIN.signature.inputs[0], max_request_bytes=48))(inputs) == 4
    with pytest.raises(PayloadTooLarge, match="48 bytes; expected at most 47") as caught:
        InputCheck(advert(PLAIN.signature.inputs[0], max_request_bytes=47))(inputs)
    assert caught.value.detail == {"model": "m", "size": 48, "limit": 47}


ARRAY = st.builds(
    lambda dtype, shape: np.zeros(shape, dtype),
    st.sampled_from(["float32", "float32", "int64", ">f4"]),
    st.lists(st.integers(0, 5), max_size=3),
)


def verdict(check: Any, *given: Any) -> tuple[type, str] | int:
    try:
        return int(check(*given))
    except InferqError as error:
        return type(error), str(error)


@given(
    st.sampled_from([PLAIN, PAIR, SAME_N, FREE, FIXED, SMALL]),
    st.dictionaries(st.sampled_from(["x", "a", "b"]), ARRAY, max_size=3),
)
def test_the_quick_check_gives_the_thorough_checks_verdict(
    model: ModelAdvert, inputs: dict[str, Array]
) -> None:
    assert verdict(InputCheck(model), inputs) == verdict(check_inputs, model, inputs)


DIM = st.integers(1, 3) | st.sampled_from(["n", "m"]) | st.none()
SPECS = st.lists(
    st.builds(
        spec, st.sampled_from(["x", "a", "b"]), st.sampled_from(["float32", "int64"]), DIM, DIM
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda each: each.name,
)


@given(SPECS, st.dictionaries(st.sampled_from(["x", "a", "b"]), ARRAY, max_size=3))
def test_inputs_of_any_signature_fit_or_are_refused_and_alike_by_both_checks(
    inputs: list[TensorSpec], arrays: dict[str, Array]
) -> None:
    batchable = Signature(tuple(inputs), tuple(inputs)).batch_symbol is not None
    model = advert(*inputs, batchable=batchable)
    found = verdict(check_inputs, model, arrays)
    assert verdict(InputCheck(model), arrays) == found
    if isinstance(found, int):
        sizes: dict[str, int] = {}
        for each in inputs:
            array = arrays[each.name]
            assert array.dtype.newbyteorder("=") == np.dtype(each.dtype)
            for size, dim in zip(array.shape, each.shape, strict=True):
                wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                assert wanted in (size, None)
        assert found == (arrays[inputs[0].name].shape[0] if batchable else 1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "symbol"),
    [
        ([("n", 3)], [("n",)], "n"),
        ([("n", 3), ("n",)], [("n", "m")], "n"),
        ([("n", 3), ("m",)], [("n",)], None),
        ([("n", 3)], [("m",)], None),
        ([("n", 3)], [(1,)], None),
        ([(1, 3)], [(1,)], None),
        ([(None, 3)], [(None,)], None),
        ([()], [()], None),
    ],
)
def test_a_batch_is_one_symbol_at_dim_0_of_everything(
    inputs: list[Any], outputs: list[Any], symbol: str | None
) -> None:
    signature = Signature(
        tuple(TensorSpec(f"i{n}", "float32", shape) for n, shape in enumerate(inputs)),
        tuple(TensorSpec(f"o{n}", "float32", shape) for n, shape in enumerate(outputs)),
    )
    assert signature.batch_symbol == symbol


def test_tensors_are_described_shortly() -> None:
    assert describe(f4(1, 3, 224)) == "<1x3x224 float32>"
    assert describe(np.zeros((), np.uint8)) == "<scalar uint8>"
    assert nbytes({"a": f4(2, 3), "b": np.zeros(5, np.uint8)}) == 29
    assert str(PAIR.signature.inputs[1]) == "b: int64[batch, n]"


def test_a_name_list_that_is_too_long_is_not_shown_whole() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_inputs(PLAIN, {f"n{n}": f4(1) for n in range(10_000)})
    assert len(str(caught.value)) < 2000


def test_a_model_of_hundreds_of_inputs_has_its_message_cut_short() -> None:
    many = advert(*(spec(f"x{n}", "float32", "batch", 3) for n in range(500)))
    with pytest.raises(InvalidInput, match="and 436 more") as caught:
        check_inputs(many, {})
    assert len(str(caught.value)) < 5_000
