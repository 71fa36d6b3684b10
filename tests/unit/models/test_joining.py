"""Requests' rows stand in their batch in order, whatever the arrays, and without a pause."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.gil import times_given_away

from inferq.shared.schema import DTYPES, Array
from inferq.workers.models import joining
from inferq.workers.models.engine import Batch, gather, gather_into
from inferq.workers.models.joining import copied, join

#: Elements of a row that NumPy copies with the GIL held, and of one with which it lets go.
SMALL, LARGE = 4, 5000


def _parts(rows: list[int], tail: tuple[int, ...], dtype: Any, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2 if dtype is bool else 100, (n, *tail)).astype(dtype) for n in rows]


def _batch(parts: list[Array], bucket: int | None = None) -> Batch:
    rows = sum(map(len, parts))
    return Batch([{"x": part} for part in parts], rows, bucket or rows)


def _expected(parts: list[Array], rows: int) -> Array:
    """As NumPy joins them, and the last row again and again."""
    joined = np.concatenate(parts)
    return np.concatenate([joined, np.repeat(joined[-1:], rows - len(joined), axis=0)])


def test_a_batch_of_large_inputs_is_gathered_without_giving_the_gil_away() -> None:
    parts = _parts([1] * 16, (150_528,), np.uint8)
    padded = _batch(parts, bucket=21)
    assert times_given_away(lambda: gather(padded)) == 0
    assert times_given_away(lambda: gather(_batch(parts))) == 0


def test_a_fixed_buffer_is_filled_without_giving_the_gil_away() -> None:
    batch = _batch(_parts([1] * 16, (150_528,), np.uint8), bucket=21)
    buffer = {"x": np.zeros((21, 150_528), np.uint8)}
    assert times_given_away(lambda: gather_into(batch, buffer)) == 0
    alone = Batch([{"x": np.ones((3, 224, 224), np.float32)}], 1, 1, batchable=False)
    buffer = {"x": np.zeros((3, 224, 224), np.float32)}
    assert times_given_away(lambda: gather_into(alone, buffer)) == 0


def test_an_output_is_copied_without_giving_the_gil_away() -> None:
    output = np.ones((32, 1000), np.float32)
    assert times_given_away(lambda: copied(output)) == 0


def test_whoever_gives_the_gil_away_is_found() -> None:
    parts = _parts([1] * 16, (150_528,), np.uint8)
    assert times_given_away(lambda: np.concatenate(parts)) > 0


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(">f4"), np.dtype(object)], ids=str)
def test_rows_of_any_dtype_are_joined_as_numpy_joins_them(dtype: np.dtype[Any], width: int) -> None:
    parts = _parts([1, 3, 2], (2, width), dtype)
    for bucket in (6, 7, 13):
        joined = gather(_batch(parts, bucket))["x"]
        np.testing.assert_array_equal(joined, _expected(parts, bucket))
        assert joined.dtype == parts[0].dtype
        into = np.zeros((bucket, 2, width), dtype.newbyteorder("="))
        gather_into(_batch(parts, bucket), {"x": into})
        np.testing.assert_array_equal(into, _expected(parts, bucket))


@pytest.mark.parametrize("rows", [1, 2 * LARGE])
@pytest.mark.parametrize("element", ["a", b"a"])
def test_rows_that_are_one_string_are_joined(element: object, rows: int) -> None:
    parts = [np.full(rows, element, object), np.array(["last"], object)]
    expected = [*[element] * rows, *["last"] * 4]
    assert gather(_batch(parts, rows + 4))["x"].tolist() == expected
    into = np.empty(rows + 4, object)
    gather_into(_batch(parts, rows + 4), {"x": into})
    assert into.tolist() == expected


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_dtypes_that_no_buffer_can_hold_are_joined(width: int) -> None:
    parts = _parts([2, 1], (width,), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(gather(_batch(parts, 5))["x"], _expected(parts, 5))
    days = [part.astype("datetime64[D]") for part in _parts([2, 1], (width,), np.int64)]
    np.testing.assert_array_equal(gather(_batch(days, 4))["x"], _expected(days, 4))


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_views_of_any_strides_are_joined(width: int) -> None:
    base = np.arange(12 * 2 * width, dtype=np.float32).reshape(12, 2 * width)
    parts = [
        base[:2, ::2],
        base[3:5, ::-2],
        base[6:9:2, :width],
        np.asfortranarray(base[10:, :width]),
        np.broadcast_to(base[5, :width], (3, width)),
    ]
    np.testing.assert_array_equal(gather(_batch(parts, 16))["x"], _expected(parts, 16))
    into = np.zeros((16, 2 * width), np.float32)[:, ::2]
    gather_into(_batch(parts, 16), {"x": into})
    np.testing.assert_array_equal(into, _expected(parts, 16))


@pytest.mark.parametrize("tail", [(), (1,), (0,), (3, 0, 2), (LARGE, 0)], ids=str)
@pytest.mark.parametrize("bucket", [6, 8])
def test_rows_of_one_number_and_of_none_are_joined(tail: tuple[int, ...], bucket: int) -> None:
    parts = _parts([1, 2, 3], tail, np.int64)
    joined = gather(_batch(parts, bucket))["x"]
    np.testing.assert_array_equal(joined, _expected(parts, bucket))
    assert joined.shape == (bucket, *tail)


def test_a_request_without_rows_adds_none() -> None:
    parts = _parts([2, 0, 1], (LARGE,), np.float32)
    np.testing.assert_array_equal(gather(_batch(parts))["x"], _expected(parts, 3))


def test_what_is_too_large_to_hold_the_gil_for_is_joined_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joining, "HELD_BYTES", 3 * LARGE)
    parts = _parts([1, 5, 2], (LARGE,), np.uint8)
    for bucket in (8, 9, 20):
        np.testing.assert_array_equal(gather(_batch(parts, bucket))["x"], _expected(parts, bucket))
    np.testing.assert_array_equal(copied(parts[1]), parts[1])


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("held", [1, 1 << 30])
def test_rows_of_another_shape_or_dtype_are_never_fitted_in(
    monkeypatch: pytest.MonkeyPatch, width: int, held: int
) -> None:
    """NumPy would spread one number over a row, and cut fractions off."""
    monkeypatch.setattr(joining, "HELD_BYTES", held)
    right = np.ones((1, width), np.float32)
    for wrong in (
        np.ones((1, 1), np.float32),
        np.ones((1, 2 * width), np.float32),
        np.ones((1, width, 1), np.float32),
        np.ones((1, width), np.int32),
        np.ones((1, width), np.float64),
    ):
        with pytest.raises((TypeError, ValueError)):
            join([right, wrong], np.empty((2, width), np.float32))
        with pytest.raises((TypeError, ValueError)):
            gather_into(
                Batch([{"x": wrong[0]}], 1, 1, batchable=False),
                {"x": np.empty(width, np.float32)},
            )


def test_the_parts_must_not_be_more_rows_than_fit() -> None:
    for width in (SMALL, LARGE):
        parts = _parts([2, 2], (width,), np.float32)
        with pytest.raises(ValueError, match=r"wrong shape|different structures"):
            join(parts, np.empty((3, width), np.float32))


@pytest.mark.parametrize("array", [np.float32(3.5), np.zeros((0, 4)), np.arange(9000.0)], ids=repr)
def test_a_copy_has_memory_of_its_own(array: Any) -> None:
    array = np.asarray(array)
    copy = copied(array)
    np.testing.assert_array_equal(copy, array)
    assert copy.shape == array.shape
    assert copy.dtype == array.dtype
    assert copy.flags.writeable
    assert copy.flags.owndata
    assert not np.shares_memory(copy, array)
