"""Only the dims that ``[pad]`` names are padded, and a request gets its own sizes back."""

from __future__ import annotations

import numpy as np
import pytest

from inferq.shared.errors import InvalidInput
from inferq.shared.schema import Array, Signature, TensorSpec
from inferq.workers.batching.growth import Grid, Growth
from inferq.workers.batching.padding import Measured, Padding, PadRule

IDS = TensorSpec("ids", "int64", ("batch", "seq"))
MASK = TensorSpec("mask", "float32", ("batch", "seq", 2))
OTHER = TensorSpec("other", "float32", ("batch", "width", "seq"))
OUT = TensorSpec("out", "float32", ("batch", "seq", 3))
POOLED = TensorSpec("pooled", "float32", ("batch", 3))
SIGNATURE = Signature((IDS, MASK, OTHER), (OUT, POOLED))
SEQ = PadRule((4, 8), 0.0)
SAME, HALF = Growth(Grid(), 1, (1,)), Growth(Grid(), 1, (0, 1))


def inputs(seq: int, width: int = 2, rows: int = 2) -> dict[str, Array]:
    return {
        "ids": np.ones((rows, seq), np.int64),
        "mask": np.ones((rows, seq, 2), np.float32),
        "other": np.ones((rows, width, seq), np.float32),
    }


@pytest.mark.parametrize(("seq", "bucket"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_a_named_dim_grows_to_its_next_bucket_in_every_input(seq: int, bucket: int) -> None:
    padded, sizes = Padding(SIGNATURE, {"seq": SEQ}).apply(inputs(seq))
    assert sizes == {"seq": seq}
    assert {name: array.shape for name, array in padded.items()} == {
        "ids": (2, bucket),
        "mask": (2, bucket, 2),
        "other": (2, 2, bucket),
    }
    for array in padded.values():
        assert array.sum() == inputs(seq)["ids"].size * array.size / (2 * bucket)


def test_padding_keeps_the_dtype_and_stands_behind_the_data() -> None:
    padded, _ = Padding(SIGNATURE, {"seq": PadRule((4,), 7.0)}).apply(inputs(3))
    assert padded["ids"].dtype == np.int64
    np.testing.assert_array_equal(padded["ids"], [[1, 1, 1, 7]] * 2)


def test_each_dim_is_padded_with_its_own_value() -> None:
    rules = {"seq": PadRule((4,), 5.0), "width": PadRule((3,), 9.0)}
    padded, sizes = Padding(SIGNATURE, rules).apply(inputs(3, rows=1))
    assert sizes == {"seq": 3, "width": 2}
    other = padded["other"][0]
    np.testing.assert_array_equal(other[:2], [[1, 1, 1, 5]] * 2)
    np.testing.assert_array_equal(other[2, :3], [9, 9, 9])
    np.testing.assert_array_equal(padded["mask"][0, 3], [5, 5])


def test_a_size_over_the_last_bucket_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"'ids': dim 1 \(seq\) is 9; expected at most 8"):
        Padding(SIGNATURE, {"seq": SEQ}).apply(inputs(9))


def test_without_rules_nothing_is_touched() -> None:
    given = inputs(3)
    padded, sizes = Padding(SIGNATURE, {}).apply(given)
    assert sizes is None
    assert all(padded[name] is given[name] for name in given)
    outputs = {"out": np.zeros((2, 3, 3))}
    assert Padding(SIGNATURE, {}).cut(outputs, sizes) is outputs


def test_what_needs_no_padding_is_not_copied() -> None:
    given = inputs(4)
    padded, _ = Padding(SIGNATURE, {"seq": SEQ}).apply(given)
    assert all(padded[name] is given[name] for name in given)


def test_outputs_are_cut_back_as_their_dims_were_measured_to_grow() -> None:
    """Whatever the signature says: here that `out` has the dim."""
    measured = Measured(growths={"out": {1: ("seq", HALF)}, "other": {2: ("seq", SAME)}})
    padding = Padding(SIGNATURE, {"seq": SEQ}, measured)
    _, sizes = padding.apply(inputs(5))
    outputs = {
        "out": np.arange(24.0).reshape(2, 4, 3),
        "other": np.arange(36.0).reshape(2, 2, 9),
        "pooled": np.arange(6.0).reshape(2, 3),
    }
    cut = padding.cut(outputs, sizes)
    np.testing.assert_array_equal(cut["out"], outputs["out"][:, :2])
    np.testing.assert_array_equal(cut["other"], outputs["other"][:, :, :6])
    assert cut["pooled"] is outputs["pooled"]


def test_a_size_that_is_a_bucket_is_neither_padded_nor_cut() -> None:
    padding = Padding(SIGNATURE, {"seq": SEQ}, Measured(growths={"out": {1: ("seq", SAME)}}))
    _, sizes = padding.apply(inputs(4))
    outputs = {"out": np.zeros((2, 4, 3))}
    assert padding.cut(outputs, sizes) is outputs


def test_a_size_that_the_model_does_not_take_is_refused_by_name() -> None:
    padding = Padding(SIGNATURE, {"seq": SEQ}, Measured(grids={"seq": Grid(3)}))
    padding.apply(inputs(3))
    with pytest.raises(InvalidInput, match=r"'ids': dim 1 \(seq\) is 2; expected at least 3"):
        padding.apply(inputs(2))


def test_each_input_has_its_own_value_and_0_where_none_is_named() -> None:
    rule = PadRule((4,), {"ids": 1, "other": -float("inf")})
    padded, _ = Padding(SIGNATURE, {"seq": rule}).apply(inputs(3))
    assert padded["ids"][0, 3] == 1
    assert (padded["mask"][0, 3] == 0).all()
    assert np.isneginf(padded["other"][0, :, 3]).all()


def test_large_integers_stand_in_the_padding_as_they_are() -> None:
    padded, _ = Padding(SIGNATURE, {"seq": PadRule((4,), {"ids": 2**63 - 1})}).apply(inputs(3))
    assert padded["ids"][0, 3] == 2**63 - 1


@pytest.mark.parametrize("axes", [(2, 5, 4), (3, 3, 3), (3, 5, 3)])
def test_what_is_filled_up_is_as_numpy_pads_it(axes: tuple[int, ...]) -> None:
    spec = TensorSpec("x", "float32", ("batch", "a", "b", "c"))
    rules = {n: PadRule((6,), float(v)) for n, v in zip("abc", (-1, -2, -3), strict=True)}
    x = np.random.default_rng(0).random((2, *axes), np.float32)
    padded, _ = Padding(Signature((spec,), ()), rules).apply({"x": x})
    widths = [(0, 0), *((0, 6 - n) for n in axes)]
    values = [(0, 0), (0, -1), (0, -2), (0, -3)]
    np.testing.assert_array_equal(padded["x"], np.pad(x, widths, constant_values=values))


def test_the_batch_is_never_padded() -> None:
    signature = Signature((TensorSpec("x", "float32", ("n", "n")),), ())
    padding = Padding(signature, {"n": PadRule((4,), 0.0)})
    padded, _ = padding.apply({"x": np.ones((3, 3), np.float32)})
    assert padded["x"].shape == (3, 4)


def test_a_padded_dim_that_holds_nothing_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"'ids': dim 1 \(seq\) is 0; expected at least 1"):
        Padding(SIGNATURE, {"seq": SEQ}).apply(inputs(0))
