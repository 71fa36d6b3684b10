"""A model is padded only if that was seen to change no answer; what it adds is cut off again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from helpers import padded_models
from helpers.padded_models import RIGHT, WRONG, Padded

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError, InvalidInput
from inferq.shared.schema import Array, Signature, Tensors, TensorSpec
from inferq.workers.batching.padding import Padding, PadRule
from inferq.workers.models.repository import load_model
from inferq.workers.pad_probe.probe import measured_padding
from inferq.workers.pad_probe.trials import Run
from inferq.workers.row_probe.agreement import difference

X = TensorSpec("x", "float32", ("batch", "n"))
Y = TensorSpec("y", "float32", ("batch", "m"))
XY = Signature((X,), (Y,))


class Model:
    """One of the helpers' models, in a repository, and ONNX Runtime itself."""

    def __init__(self, root: Path, padded: Padded) -> None:
        path = padded_models.write(root / "m" / "1" / "model.onnx", padded)
        (root / "m" / "model.toml").write_text(padded.pad)
        self.spec = load_model(root, "m")
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(self, inputs: Tensors) -> Mapping[str, Array]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def padding(self) -> Padding:
        return measured_padding(
            self.spec.signature, self.spec.config.pad, self.run, batch=self.spec.batch_symbol
        )


def rule(*buckets: int, value: float | Mapping[str, float] = 0.0) -> dict[str, PadRule]:
    return {"n": PadRule(buckets, value)}


def refused(signature: Signature, rules: Mapping[str, PadRule], run: Run) -> str:
    with pytest.raises(ConfigError) as refusal:
        padding_of(signature, rules, run)
    return refusal.value.message


def padding_of(
    signature: Signature, rules: Mapping[str, PadRule], run: Run, **given: Any
) -> Padding:
    return measured_padding(signature, rules, run, batch="batch", **given)


def doubled(inputs: Tensors) -> Mapping[str, Array]:
    return {"y": inputs["x"] * 2}


@pytest.mark.parametrize("name", RIGHT)
def test_padded_answers_are_those_of_the_model_alone_at_every_size(
    tmp_path: Path, name: str
) -> None:
    model = Model(tmp_path, RIGHT[name])
    padding = model.padding()
    rng = np.random.default_rng(1)
    for number in range(len(RIGHT[name].sizes)):
        inputs = padded_models.request(RIGHT[name], rng, number)
        padded, sizes = padding.apply(inputs)
        answer = padding.cut(model.run(padded), sizes)
        assert difference(model.run(inputs), answer) is None


@pytest.mark.parametrize("name", WRONG)
def test_padding_that_changes_answers_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    padded, reason = WRONG[name]
    with pytest.raises(ConfigError) as refusal:
        Model(tmp_path, padded).padding()
    assert reason in refusal.value.message


def test_a_refusal_says_sizes_inputs_output_and_by_how_much(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"pad.n: answers change where n 15 is padded to 16, on random values: "
        r"output 'y' differs by [\d.]+ of values up to [\d.]+ \(cosine [\d.]+\); "
        r"expected no \[pad.n\]",
    ):
        Model(tmp_path, WRONG["mean"][0]).padding()


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        ("valid", [1, 2], "at least 3"),
        ("stride", [1], "at least 2"),
        ("multiples_of_4", [1, 3, 5, 6, 15], "4, 8, 12, …"),
    ],
)
def test_a_size_that_the_model_rejects_unpadded_is_not_padded_either(
    tmp_path: Path, name: str, bad: Sequence[int], expected: str
) -> None:
    model = Model(tmp_path, RIGHT[name])
    padding = model.padding()
    for size in bad:
        with pytest.raises(InvalidInput, match=rf"'x': dim 2 \(n\) is {size}; expected {expected}"):
            padding.apply({"x": np.ones((1, 3, size), np.float32)})


def test_the_advice_was_tried_and_holds(tmp_path: Path) -> None:
    """What is written as told is served; what the advice itself would not mend is not told."""
    for name in ("mask_padded_with_1", "maximum_padded_with_0", "argmax_padded_with_0", "softmax"):
        padded, _ = WRONG[name]
        with pytest.raises(ConfigError) as refusal:
            Model(tmp_path / name, padded).padding()
        _, found, advice = refusal.value.message.partition("expected value = ")
        assert found
        value, _, where = advice.partition(" in [pad.")
        assert where.endswith("], under which they do not")
        table = padded.pad[: padded.pad.index("value")] + f"value = {value}\n"
        Model(tmp_path / name / "again", Padded(padded.graph, table)).padding()


def test_what_is_measured_wins_over_what_the_file_says() -> None:
    says = Signature((X,), (TensorSpec("y", "float32", ("batch", "n")),))
    padding = padding_of(says, rule(8), lambda given: {"y": given["x"][:, ::2]})
    padded, sizes = padding.apply({"x": np.arange(5, dtype=np.float32)[None]})
    assert padding.cut({"y": padded["x"][:, ::2]}, sizes)["y"].tolist() == [[0, 2, 4]]


def test_an_output_that_varies_from_run_to_run_shows_nothing_but_its_shape() -> None:
    rng = np.random.default_rng()

    def noise(given: Tensors) -> Mapping[str, Array]:
        return {"y": rng.random(given["x"].shape, np.float32)}

    padding = padding_of(XY, rule(8), noise)
    assert padding.cut({"y": np.ones((1, 8))}, {"n": 3})["y"].shape == (1, 3)

    def noise_and_mean(given: Tensors) -> Mapping[str, Array]:
        return {**noise(given), "mean": given["x"].mean(1)}

    assert "output 'mean' differs" in refused(XY, rule(8), noise_and_mean)


def test_an_index_may_turn_over_where_all_values_are_equal() -> None:
    """Of equal values rounding decides which is the largest."""
    runs = iter(range(10_000))

    def largest(given: Tensors) -> Mapping[str, Array]:
        x = given["x"]
        x = x + (np.arange(x.shape[1]) == next(runs) % x.shape[1]) * 1e-6
        return {"y": x.argmax(1)}

    rules = {"n": PadRule((8,), -1e9)}
    padding_of(XY, rules, largest)


def test_sums_that_nearly_cancel_out_are_compared_by_what_the_output_can_be() -> None:
    def noisy_sum(given: Tensors) -> Mapping[str, Array]:
        x = given["x"]
        return {"y": x.sum(1) + 1e-6 * x.shape[1]}

    padding_of(XY, rule(8), noisy_sum)


def test_what_only_one_kind_of_inputs_shows_a_little_is_rounding_that_was_blown_up() -> None:
    """As where a variance cancels out."""

    def of_ones(by: float) -> Run:
        def run(given: Tensors) -> Mapping[str, Array]:
            x = given["x"]
            return {"y": x[:, :1] + by * x.shape[1] * (x[:, :4] == 1).all() + 0 * x}

        return run

    padding_of(XY, rule(8), of_ones(0.01))
    assert "on ones: output 'y' differs by" in refused(XY, rule(8), of_ones(1.0))


def test_answers_that_are_no_numbers_show_nothing() -> None:
    def nothing(given: Tensors) -> Mapping[str, Array]:
        return {"y": given["x"] * np.nan}

    assert "no size that is padded could be compared" in refused(XY, rule(8), nothing)


def test_large_answers_to_large_inputs_hide_no_change_of_others() -> None:
    """Only every third size is padded wrongly, and large inputs are answered by millions."""

    def run(given: Tensors) -> Mapping[str, Array]:
        x = given["x"].astype(np.float64)
        return {"y": x**5 + 0.1 * (x.shape[1] % 3 == 1)}

    assert "is padded to 15, on random values: output 'y' differs" in refused(XY, rule(15), run)


def test_a_card_may_round_more() -> None:
    def rounded(given: Tensors) -> Mapping[str, Array]:
        return {"y": given["x"] * (1 + 3e-4 * given["x"].shape[1])}

    assert "differs" in refused(XY, rule(8), rounded)
    padding_of(XY, rule(8), rounded, rounding=50.0)


def test_a_bucket_of_one_pads_nothing() -> None:
    padding = padding_of(XY, rule(1), doubled)
    given = {"x": np.ones((1, 1), np.float32)}
    assert padding.apply(given) == (given, {"n": 1})


def test_dims_that_only_change_together_are_padded_together() -> None:
    signature = Signature((X, TensorSpec("z", "float32", ("batch", "m"))), (Y,))
    rules = {"n": PadRule((8,), 0.0), "m": PadRule((8,), 0.0)}
    padding = padding_of(signature, rules, lambda given: {"y": given["x"] * given["z"]})
    x: Array = np.ones((1, 5), np.float32)
    padded, sizes = padding.apply({"x": x, "z": x})
    assert padding.cut({"y": padded["x"]}, sizes)["y"].shape == (1, 5)
    with pytest.raises(InvalidInput, match="sizes are n 5, m 4; expected one size"):
        padding.apply({"x": x, "z": x[:, :4]})


@pytest.mark.parametrize(
    "run",
    [
        lambda given: {"y": given["x"] * given["x"].shape[1]},
        lambda given: {"y": given["x"][:, -1:]},
        lambda given: {"y": given["x"] - given["x"].min(1, keepdims=True)},
        lambda given: {"y": np.abs(given["x"]).min(1)},
        lambda given: {"y": (given["x"] > 0).mean(1, keepdims=True)},
    ],
)
def test_each_way_to_look_at_the_padding_is_seen(run: Run) -> None:
    assert "answers change" in refused(XY, rule(8, 16), run)


def test_a_dim_that_nothing_explains_is_refused_with_what_was_seen() -> None:
    reason = refused(XY, rule(512), lambda given: {"y": np.ones((1, given["x"].shape[1] ** 2))})
    assert "nothing was found that explains dim 1 of output 'y' by n (1 → 1, 2 → 4, 3 → 9" in reason


def test_a_model_that_takes_no_size_but_its_buckets_is_refused() -> None:
    def only_8(given: Tensors) -> Mapping[str, Array]:
        if given["x"].shape[1] != 8:
            raise EngineError("expected 8 of them")
        return doubled(given)

    reason = refused(XY, rule(8), only_8)
    assert "pad.n: no size that is padded could be compared with an unpadded run" in reason
    assert "expected 8 of them" in reason


def test_a_bucket_that_the_model_rejects_is_named() -> None:
    def at_most_20(given: Tensors) -> Mapping[str, Array]:
        if given["x"].shape[1] > 20:
            raise EngineError("too long")
        return doubled(given)

    reason = refused(XY, rule(8, 32), at_most_20)
    assert "pad.n.buckets has 32" in reason
    assert "(too long)" in reason


def test_a_model_that_runs_no_example_is_refused() -> None:
    def never(given: Tensors) -> Mapping[str, Array]:
        raise EngineError("not with me")

    assert "[pad] cannot be checked: the model rejects inputs of n = 8 (not with me)" in refused(
        XY, rule(8), never
    )


def test_what_an_engine_was_not_built_for_is_padded_as_its_larger_sizes_show() -> None:
    """A TensorRT profile begins at the first bucket."""

    def from_8_on(given: Tensors) -> Mapping[str, Array]:
        if given["x"].shape[1] < 8:
            raise InvalidInput("dim 1 is too small; expected 8 to 16, for which it was built")
        return {"y": given["x"][:, 2:]}

    padding = padding_of(XY, rule(8, 16), from_8_on)
    padded, sizes = padding.apply({"x": np.arange(5, dtype=np.float32)[None]})
    assert padding.cut(from_8_on(padded), sizes)["y"].tolist() == [[2, 3, 4]]
    with pytest.raises(InvalidInput, match="expected at least 3"):
        padding.apply({"x": np.zeros((1, 2), np.float32)})
    from_8 = rule(8)
    assert "could be compared" in refused(XY, from_8, lambda g: from_8_on({"x": g["x"][:, :8]}))


def test_a_beyond_use_engine_ends_the_probe() -> None:
    def broken(given: Tensors) -> Mapping[str, Array]:
        raise FatalEngineError("gone")

    with pytest.raises(FatalEngineError):
        padding_of(XY, rule(8), broken)


def test_a_slow_model_is_compared_for_a_bounded_time_which_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = 0

    def slow(given: Tensors) -> Mapping[str, Array]:
        nonlocal runs
        runs += 1
        time.sleep(0.02)
        return doubled(given)

    with caplog.at_level(logging.WARNING):
        padding_of(XY, rule(8, 64, 512), slow, seconds=0.1)
    assert runs < 20
    assert "was probed for" in caplog.text

    def slow_and_wrong(given: Tensors) -> Mapping[str, Array]:
        return {"y": slow(given)["y"].sum(1) + given["x"].shape[1]}

    with pytest.raises(ConfigError):
        padding_of(XY, rule(8, 64, 512), slow_and_wrong, seconds=0.0)


def test_without_rules_nothing_is_run() -> None:
    def never(given: Tensors) -> Mapping[str, Array]:
        raise AssertionError

    given = {"x": np.ones((1, 3), np.float32)}
    assert padding_of(XY, {}, never).apply(given) == (given, None)


def test_two_padded_dims_are_compared_together_too() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", "h", "w")),), (Y,))
    rules = {"h": PadRule((4,), 0.0), "w": PadRule((6,), 0.0)}

    def corner(given: Tensors) -> Mapping[str, Array]:
        """Wrong only where both are padded: it tells how many corners of four zeros there are."""
        x = given["x"] != 0
        return {"y": np.array([float(not x[0, -1].any() and not x[0, :, -1].any())], np.float32)}

    with pytest.raises(
        ConfigError, match=r"pad.h, pad.w: answers change where h 3 is padded to 4 "
    ):
        padding_of(signature, rules, corner)


# --- text ----------------------------------------------------------------------------------------

WORDS = Signature(
    (TensorSpec("x", "string", ("batch", "n")),), (TensorSpec("y", "string", ("batch", "m")),)
)


def test_strings_are_padded_with_empty_ones_which_are_cut_off_again() -> None:
    padding = padding_of(WORDS, rule(4), lambda inputs: {"y": inputs["x"]})
    arrays, sizes = padding.apply({"x": np.array([["a", "b"]], object)})
    assert arrays["x"].tolist() == [["a", "b", "", ""]]
    assert padding.cut({"y": arrays["x"]}, sizes)["y"].tolist() == [["a", "b"]]


def test_padding_that_changes_a_string_is_refused() -> None:
    def joined(inputs: Tensors) -> Mapping[str, Array]:
        rows = ["|".join(row) for row in inputs["x"].tolist()]
        return {"y": np.array([[row] for row in rows], object)}

    told = refused(WORDS, rule(4), joined)
    assert "output 'y' differs in 1 of 1 values" in told
    assert "expected no [pad.n]" in told
