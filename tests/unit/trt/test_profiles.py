"""The shapes that a plan is built for follow from model.toml, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import onnx_models

from inferq.shared.errors import ConfigError
from inferq.workers.models.ranges import InputRange, Sizes, input_ranges, profile_sizes
from inferq.workers.models.repository import load_model
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.profiles import as_toml, open_ranges, parse_batch


def symbol_sizes(spec: ModelSpec, batch: Sizes | None = None) -> dict[str, Sizes]:
    """Of the one profile."""
    (sizes,) = profile_sizes(spec, batch)
    return sizes


def _pooled(root: Path, toml: str = "") -> ModelSpec:
    """x: float32[batch, seq, 4]."""
    onnx_models.pooled(root / "pooled" / "1" / "model.onnx")
    (root / "pooled" / "model.toml").write_text(toml)
    return load_model(root, "pooled")


def _double(root: Path, toml: str = "") -> ModelSpec:
    onnx_models.double(root / "double" / "1" / "model.onnx")
    (root / "double" / "model.toml").write_text(toml)
    return load_model(root, "double")


@pytest.mark.parametrize(
    ("toml", "sizes"),
    [
        ("", (1, 32, 32)),
        ("max_batch_size = 8", (1, 8, 8)),
        ("max_batch_size = 8\npreferred_batch_sizes = [2, 4]", (1, 4, 8)),
        ("buckets = [4, 16]", (1, 16, 16)),
        ("max_batch_size = 9\nbuckets = [4, 16, 32]", (1, 16, 16)),
        ("max_batch_size = 8\n[profile]\nbatch = [1, 2, 16]", (1, 2, 16)),
        ("buckets = [4, 16]\n[profile]\nbatch = [4, 4, 16]", (4, 4, 16)),
    ],
)
def test_the_batch_follows_from_the_knobs(
    tmp_path: Path, toml: str, sizes: tuple[int, int, int]
) -> None:
    assert symbol_sizes(_double(tmp_path, toml)) == {"batch": sizes}


def test_the_command_line_wins_for_the_batch(tmp_path: Path) -> None:
    spec = _double(tmp_path, "[profile]\nbatch = [1, 2, 32]")
    assert symbol_sizes(spec, (1, 8, 64)) == {"batch": (1, 8, 64)}


def test_padded_dims_go_by_their_buckets(tmp_path: Path) -> None:
    spec = _pooled(tmp_path, "max_batch_size = 2\n[pad.seq]\nbuckets = [32, 128, 512]")
    sizes = symbol_sizes(spec)
    assert sizes == {"batch": (1, 2, 2), "seq": (32, 512, 512)}
    assert input_ranges(spec, sizes) == (InputRange("x", (1, 32, 4), (2, 512, 4), (2, 512, 4)),)


def test_a_dim_of_unknown_size_wants_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"how large 'seq'.*\[profile\] seq = \[smallest, op"):
        symbol_sizes(_pooled(tmp_path))
    spec = _pooled(tmp_path, "[profile]\nseq = [1, 64, 256]")
    assert symbol_sizes(spec)["seq"] == (1, 64, 256)


def test_a_dim_without_a_name_is_refused(tmp_path: Path) -> None:
    onnx_models.double(tmp_path / "open" / "1" / "model.onnx", ("batch", None))
    with pytest.raises(ConfigError, match=r"dim 1 of input .* has no name"):
        symbol_sizes(load_model(tmp_path, "open"))


def test_fixed_inputs_need_no_profile(tmp_path: Path) -> None:
    onnx_models.double(tmp_path / "fixed" / "1" / "model.onnx", (1, 3))
    spec = load_model(tmp_path, "fixed")
    ranges = input_ranges(spec, symbol_sizes(spec))
    assert ranges == (InputRange("x", (1, 3), (1, 3), (1, 3)),)
    assert open_ranges(spec, ranges) == ()
    with pytest.raises(ConfigError, match="--batch is 1,2,4; expected none, since the model is no"):
        symbol_sizes(spec, (1, 2, 4))


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("max_batch_size = 8\n[profile]\nbatch = [1, 4, 4]", "the last to be at least 8"),
        (
            "max_batch_size = 9\nbuckets = [4, 16]\n[profile]\nbatch = [4, 9, 9]",
            "the last to be at least 16",
        ),
        ("[profile]\nbatch = [2, 4, 32]", "the first to be at most 1"),
        ("[pad.seq]\nbuckets = [8, 16]\n[profile]\nseq = [8, 8, 8]", "the last to be at least 16"),
        ("[pad.seq]\nbuckets = [8, 16]\n[profile]\nseq = [9, 9, 16]", "the first to be at most 8"),
    ],
)
def test_a_profile_covers_all_that_can_occur(tmp_path: Path, toml: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        symbol_sizes(_pooled(tmp_path, toml))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "batch = [8, 4, 1]",
            "profile.batch is .*; expected the smallest, the optimum and the larg",
        ),
        ("batch = [1, 4]", "profile.batch"),
        ("batch = [0, 4, 32]", "profile.batch.0 is 0; expected at least 1"),
        ("batch = [1.0, 4, 32]", "profile.batch.0 is 1.0; expected an integer"),
        ("batch = 8", "profile.batch is 8; expected a list"),
        ("rows = [1, 4, 32]", r"profile.rows names no dim; expected a symbol of an input \(batch"),
    ],
)
def test_a_wrong_profile_names_key_value_and_expectation(
    tmp_path: Path, line: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        _double(tmp_path, f"[profile]\n{line}")


def test_too_large_a_shape_is_refused(tmp_path: Path) -> None:
    spec = _pooled(tmp_path, "[profile]\nseq = [1, 1, 16777216]")
    with pytest.raises(ConfigError, match="2147483648 elements at its largest"):
        input_ranges(spec, symbol_sizes(spec))


@pytest.mark.parametrize(
    "text", ["", "8", "1,8", "1,8,64,128", "8,1,64", "0,1,2", "a,b,c", "1,2,9e9"]
)
def test_a_wrong_batch_option_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match="expected three ascending sizes from 1 to 65536, as 1,8,"
    ):
        parse_batch(text)


def test_sizes_are_shown_as_the_table_that_gives_them(tmp_path: Path) -> None:
    assert parse_batch("1,8,64") == (1, 8, 64)
    shown = as_toml([{"batch": (1, 8, 64), "a b": (1, 1, 2)}])
    assert shown == '[profile]\nbatch = [1, 8, 64]\n"a b" = [1, 1, 2]'


SEVERAL = """
max_batch_size = 16
[[profile]]
batch = [1, 8, 16]
seq = [1, 32, 64]
[[profile]]
batch = [1, 1, 2]
seq = [65, 256, 512]
"""


def test_several_profiles_come_the_smallest_first_whatever_their_order(tmp_path: Path) -> None:
    small = {"batch": (1, 8, 16), "seq": (1, 32, 64)}
    large = {"batch": (1, 1, 2), "seq": (65, 256, 512)}
    given = _pooled(tmp_path, SEVERAL)
    assert profile_sizes(given) == (small, large)
    larger = {**large, "batch": (1, 1, 3)}
    for tables in ([small, larger], [larger, small]):
        spec = _pooled(tmp_path, "max_batch_size = 16\n" + as_toml(tables))
        assert profile_sizes(spec) == (small, larger)


def test_on_what_a_profile_is_silent_the_knobs_decide(tmp_path: Path) -> None:
    toml = "max_batch_size = 4\n[[profile]]\nseq = [1, 2, 4]\n[[profile]]\nseq = [4, 8, 8]\n"
    first, second = profile_sizes(_pooled(tmp_path, toml))
    assert first == {"batch": (1, 4, 4), "seq": (1, 2, 4)}
    assert second == {"batch": (1, 4, 4), "seq": (4, 8, 8)}
    with pytest.raises(ConfigError, match="nothing says how large 'seq'"):
        profile_sizes(_pooled(tmp_path, "[[profile]]\nseq = [1, 2, 4]\n[[profile]]\n"))


def test_profiles_that_differ_in_nothing_are_one(tmp_path: Path) -> None:
    toml = "[[profile]]\nbatch = [1, 1, 1]\n[[profile]]\nbatch = [2, 8, 32]\n"
    assert len(profile_sizes(_double(tmp_path, toml))) == 2
    assert profile_sizes(_double(tmp_path, toml), (1, 8, 64)) == ({"batch": (1, 8, 64)},)


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        (
            "[[profile]]\nbatch = [1, 4, 4]\n[[profile]]\nbatch = [4, 8, 31]",
            r"profile.batch is \[1, 4, 4\] and \[4, 8, 31\]; expected the last of one to be at l",
        ),
        (
            "[[profile]]\nbatch = [2, 4, 4]\n[[profile]]\nbatch = [4, 8, 32]",
            "expected the first of one to be at most 1",
        ),
        (
            "[pad.seq]\nbuckets = [8, 16, 32]\n"
            "[[profile]]\nseq = [8, 8, 8]\n[[profile]]\nseq = [17, 32, 32]",
            "expected one to hold 16, which can occur",
        ),
    ],
)
def test_several_profiles_hold_together_all_that_can_occur(
    tmp_path: Path, toml: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        profile_sizes(_pooled(tmp_path, toml))


def test_a_wrong_one_of_several_profiles_is_named(tmp_path: Path) -> None:
    good = "[[profile]]\nbatch = [1, 4, 32]\n"
    with pytest.raises(ConfigError, match=r"profile.1.batch.0 is 0; expected at least 1"):
        _double(tmp_path, good + "[[profile]]\nbatch = [0, 4, 32]")
    with pytest.raises(ConfigError, match=r"profile.rows names no dim"):
        _double(tmp_path, good + "[[profile]]\nrows = [1, 4, 32]")
    with pytest.raises(ConfigError, match=r"profile is .*; expected at most 8 of them"):
        _double(tmp_path, "".join(f"[[profile]]\nbatch = [1, 1, {n}]\n" for n in range(32, 41)))
    with pytest.raises(ConfigError, match=r"profile is 3; expected a list"):
        _double(tmp_path, "profile = 3")


def test_several_profiles_are_shown_as_the_tables_that_give_them(tmp_path: Path) -> None:
    shown = as_toml(profile_sizes(_pooled(tmp_path, SEVERAL)))
    assert shown == SEVERAL.strip().partition("\n")[2]
