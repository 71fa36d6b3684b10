"""Plans are built from models once, and again when anything has changed that they depend on."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
from helpers import onnx_models
from helpers.repository import fake_model
from helpers.trt import order
from onnx import TensorProto, helper

from inferq.shared.errors import ConfigError
from inferq.workers.cuda.libcuda import GpuKind
from inferq.workers.trt.builder import BuildRequest, ensure_plan, plan_key
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.plans import PlanFolder, runtime_cache_name, timing_cache_name

FLOAT = onnx_models.FLOAT
H200 = GpuKind("NVIDIA H200", "9.0", 132)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    onnx_models.double(tmp_path / "models" / "double" / "1" / "model.onnx")
    return tmp_path / "models"


@pytest.fixture
def folder(tmp_path: Path) -> PlanFolder:
    return PlanFolder(tmp_path / "plans")


def test_a_plan_is_built_once(models: Path, folder: PlanFolder) -> None:
    first = ensure_plan(order(models, "double"), folder)
    again = ensure_plan(order(models, "double"), folder)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.record == first.record
    assert again.load() == first.load()
    record = first.record
    assert (record.model_name, record.model_version, record.verified) == ("double", 1, False)
    assert (record.key.capability, record.key.gpu, record.key.precision) == ("any", "any", "fp32")


def test_of_two_that_want_the_same_plan_one_builds_it(models: Path, folder: PlanFolder) -> None:
    wanted = order(models, "double")
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: ensure_plan(wanted, folder), range(4)))
    assert sorted(plan.from_cache for plan in plans) == [False, True, True, True]


def test_an_input_and_an_output_of_one_name_are_refused(tmp_path: Path, folder: PlanFolder) -> None:
    """They would stand in one place of a lane's memory, whichever name TensorRT's parser makes."""
    onnx_models.handed_through(tmp_path / "models" / "through" / "1" / "model.onnx")
    with pytest.raises(ConfigError, match="an input and an output of the model are called 'x'"):
        ensure_plan(order(tmp_path / "models", "through"), folder)


def test_force_builds_again(models: Path, folder: PlanFolder) -> None:
    ensure_plan(order(models, "double"), folder)
    assert not ensure_plan(order(models, "double"), folder, force=True).from_cache


def test_nothing_is_built_that_could_not_be_stored(
    models: Path, folder: PlanFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: str, flags: int, *mode: int, **more: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *mode, **more)

    monkeypatch.setattr("inferq.workers.trt.plans.os.open", read_only)
    monkeypatch.setattr("inferq.workers.trt.builder._build", lambda *_: pytest.fail("built"))
    with pytest.raises(ConfigError, match="cannot be written, and holds no such plan of model 'do"):
        ensure_plan(order(models, "double"), folder)


def test_a_changed_model_is_built_again(models: Path, folder: PlanFolder) -> None:
    ensure_plan(order(models, "double"), folder)
    path = models / "double" / "1" / "model.onnx"
    model = onnx.load(path)
    model.doc_string = "changed"
    path.write_bytes(model.SerializeToString())
    assert not ensure_plan(order(models, "double"), folder).from_cache


def test_a_model_that_changes_meanwhile_makes_no_plan(
    models: Path, folder: PlanFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = order(models, "double")
    digests = iter(["before", "after"])
    monkeypatch.setattr("inferq.workers.trt.builder.model_digest", lambda path: next(digests))
    with pytest.raises(ConfigError, match=r"model\.onnx was changed while it was built"):
        ensure_plan(wanted, folder)
    assert not list(folder.path.glob("*.plan"))


@pytest.mark.parametrize(
    "change", [{"precision": "fp16"}, {"batch": (1, 2, 64)}], ids=["precision", "batch"]
)
def test_another_precision_or_profile_is_another_plan(
    models: Path, folder: PlanFolder, change: dict[str, object]
) -> None:
    ensure_plan(order(models, "double"), folder)
    other = ensure_plan(order(models, "double", **change), folder)
    assert not other.from_cache
    assert ensure_plan(order(models, "double", **change), folder).from_cache
    assert ensure_plan(order(models, "double"), folder).from_cache


def test_a_changed_profile_is_built_again(models: Path, folder: PlanFolder) -> None:
    ensure_plan(order(models, "double"), folder)
    (models / "double" / "model.toml").write_text("[profile]\nbatch = [1, 16, 32]")
    assert not ensure_plan(order(models, "double"), folder).from_cache


def test_another_release_of_tensorrt_builds_again(
    models: Path, folder: PlanFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_plan(order(models, "double"), folder)
    later = order(models, "double")
    monkeypatch.setattr(later.flavour, "version", "1.8.0")
    assert not ensure_plan(later, folder).from_cache


def test_a_plan_that_is_bound_to_no_gpu_serves_each(models: Path, folder: PlanFolder) -> None:
    plan = ensure_plan(order(models, "double"), folder)
    on_gpu = ensure_plan(order(models, "double", gpu=H200), folder)
    assert on_gpu.from_cache
    assert on_gpu.path == plan.path


@pytest.mark.parametrize(
    "other",
    [
        GpuKind("NVIDIA H100 80GB HBM3", "9.0", 132),
        GpuKind("NVIDIA H200", "9.0", 114),
        GpuKind("NVIDIA H200 MIG 1g.18gb", "9.0", 16),
    ],
    ids=["name", "processors", "a slice"],
)
def test_gpus_of_one_capability_share_neither_plans_nor_timings(
    models: Path, other: GpuKind
) -> None:
    """Kernels are chosen by how long they take, which a card's capability does not tell."""
    here, there = (plan_key(order(models, "double", gpu=gpu)) for gpu in (H200, other))
    assert here.capability == there.capability
    assert here.digest != there.digest
    assert timing_cache_name(here) != timing_cache_name(there)
    plan = Path("double.1.plan")
    assert runtime_cache_name(plan, H200) != runtime_cache_name(plan, other)
    assert "/" not in timing_cache_name(there)


def test_tensorrt_itself_builds_only_where_there_is_a_gpu(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = order(models, "double")
    monkeypatch.setattr(Flavour, "builds_anywhere", property(lambda self: False))
    with pytest.raises(ConfigError, match="builds only where there is a GPU"):
        plan_key(here)


def test_an_altered_plan_is_refused_unless_it_is_built_anew(
    models: Path, folder: PlanFolder
) -> None:
    plan = ensure_plan(order(models, "double"), folder)
    content = bytearray(plan.path.read_bytes())
    content[-1] ^= 1
    plan.path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not what was stored"):
        ensure_plan(order(models, "double"), folder)
    ensure_plan(order(models, "double"), folder, force=True)
    assert ensure_plan(order(models, "double"), folder).from_cache


def test_what_was_found_is_what_is_loaded(models: Path, folder: PlanFolder) -> None:
    """It is read once, while it is locked: what comes to stand there later does not matter."""
    built = ensure_plan(order(models, "double"), folder)
    content = built.path.read_bytes()
    found = ensure_plan(order(models, "double"), folder)
    built.path.write_bytes(b"another one")
    assert built.load() == content
    assert found.load() == content
    with pytest.raises(ConfigError, match="is not what was stored"):
        found.load()  # what was given away is not kept


def test_a_folder_that_others_may_write_is_refused(models: Path, folder: PlanFolder) -> None:
    folder.open()
    folder.path.chmod(0o777)
    with pytest.raises(
        ConfigError, match="has mode 777; expected it to be writable by you or root"
    ):
        ensure_plan(order(models, "double"), folder)


def test_a_quantised_model_is_built_as_it_is(models: Path, folder: PlanFolder) -> None:
    scale = helper.make_tensor("scale", FLOAT, [], [0.1])
    zero = helper.make_tensor("zero", TensorProto.INT8, [], [0])
    onnx_models.write(
        models / "quantised" / "1" / "model.onnx",
        [
            onnx_models.node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            onnx_models.node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            onnx_models.node("Add", "dd", "y"),
        ],
        {"x": (FLOAT, ("batch", 4))},
        {"y": (FLOAT, ("batch", 4))},
        [scale, zero],
    )
    assert ensure_plan(order(models, "quantised"), folder).load()
    with pytest.raises(ConfigError, match="is quantised already"):
        ensure_plan(order(models, "quantised", precision="fp16"), folder)


def test_weights_in_files_of_their_own_are_built_in(models: Path, folder: PlanFolder) -> None:
    path = onnx_models.external(models / "external" / "1" / "model.onnx", "w.bin")
    (path.parent / "w.bin").write_bytes(bytes(16))
    first = ensure_plan(order(models, "external"), folder)
    (path.parent / "w.bin").write_bytes(b"\0\0\x80\x3f" * 4)
    second = ensure_plan(order(models, "external"), folder)
    assert not second.from_cache
    assert second.load() != first.load()


def _refused(models: Path, folder: PlanFolder, model: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ensure_plan(order(models, model), folder)
    assert not list(folder.path.glob("*.plan"))


def test_outputs_whose_shape_depends_on_the_data_are_refused(
    models: Path, folder: PlanFolder
) -> None:
    onnx_models.write(
        models / "boxes" / "1" / "model.onnx",
        [onnx_models.node("NonMaxSuppression", ["boxes", "scores", "most", "overlap"], ["kept"])],
        {"boxes": (FLOAT, (1, 8, 4)), "scores": (FLOAT, (1, 1, 8))},
        {"kept": (onnx_models.INT64, ("k", 3))},
        [onnx_models.ints("most", [1], [10]), helper.make_tensor("overlap", FLOAT, [1], [0.5])],
    )
    _refused(models, folder, "boxes", "shape of output 'kept' depends on the inputs' values")
    onnx_models.write(
        models / "found" / "1" / "model.onnx",
        [onnx_models.node("NonZero", ["x"], ["where"])],
        {"x": (FLOAT, (4, 3))},
        {"where": (onnx_models.INT64, (2, "k"))},
    )
    _refused(models, folder, "found", "its output's shape depends on the data")


def test_inputs_that_are_shapes_are_refused(models: Path, folder: PlanFolder) -> None:
    onnx_models.write(
        models / "shaped" / "1" / "model.onnx",
        [onnx_models.node("Reshape", "xs", "y")],
        {"x": (FLOAT, (2, 4)), "s": (onnx_models.INT64, (2,))},
        {"y": (FLOAT, ("a", "b"))},
    )
    _refused(models, folder, "shaped", "the values of input 's' are used as a shape")


def test_inputs_that_tensorrt_would_change_are_refused(models: Path, folder: PlanFolder) -> None:
    onnx_models.write(
        models / "wide" / "1" / "model.onnx",
        [onnx_models.node("Add", "xx", "y")],
        {"x": (TensorProto.DOUBLE, ("batch", 3))},
        {"y": (TensorProto.DOUBLE, ("batch", 3))},
    )
    _refused(models, folder, "wide", "input 'x' is float64, of which TensorRT makes float32")


def test_a_model_without_an_onnx_file_is_refused(models: Path, folder: PlanFolder) -> None:
    fake_model(models, "echo")
    with pytest.raises(ConfigError, match=r"model 'echo' .*expected model\.onnx"):
        ensure_plan(order(models, "echo"), folder)


def test_the_order_says_its_shapes(models: Path) -> None:
    assert isinstance(order(models, "double"), BuildRequest)
    assert order(models, "double", batch=(1, 8, 64)).profiles[0][0].max == (64, 3)


def test_a_plan_of_several_profiles_is_another_one(models: Path, folder: PlanFolder) -> None:
    """Built by the real builder; what it is keyed by does not depend on their order."""
    toml = models / "double" / "model.toml"
    ensure_plan(order(models, "double"), folder)
    tables = ["[[profile]]\nbatch = [1, 1, 1]\n", "[[profile]]\nbatch = [2, 16, 32]\n"]
    toml.write_text("".join(tables))
    built = ensure_plan(order(models, "double"), folder)
    assert not built.from_cache
    assert [ranges[0].max for ranges in built.record.key.profiles] == [(1, 3), (32, 3)]
    toml.write_text("".join(reversed(tables)))
    assert ensure_plan(order(models, "double"), folder).path == built.path
    toml.write_text(tables[1].replace("[2", "[1"))
    assert not ensure_plan(order(models, "double"), folder).from_cache
