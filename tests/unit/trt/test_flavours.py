"""TensorRT's API is named in one module, as it is, and its errors arrive as ours."""

from __future__ import annotations

import ast
import inspect
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import onnx_models
from helpers.trt import REASON, rtx

from inferq.shared.errors import ConfigError
from inferq.workers.models.ranges import InputRange
from inferq.workers.trt import flavours, logs, network, phases, running
from inferq.workers.trt.api import MODULES, RTX, TENSORRT, used
from inferq.workers.trt.flavours import AUTO, Flavour, find_flavour
from inferq.workers.trt.network import build, data_dependent, parse
from inferq.workers.trt.phases import BuildStopped
from inferq.workers.trt.running import deserialize, why_unusable

SPAN = InputRange("x", (1, 3), (4, 3), (8, 3))


def _module() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason=REASON)


def test_every_name_that_is_used_is_there() -> None:
    module = _module()
    missing = [
        f"{cls}.{name}"
        for cls, names in used(RTX).items()
        for name in names
        if name not in dir(getattr(module, cls, None))
    ]
    assert missing == []


def test_the_table_names_all_that_the_module_uses() -> None:
    """Attributes in the source that TensorRT has, too, and that are none of the module's own."""
    tree = ast.parse("\n".join(map(inspect.getsource, (flavours, network, phases, running, logs))))
    accessed = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {
        target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if not isinstance(target, ast.Attribute) or getattr(target.value, "id", "") == "self"
    }
    module = _module()
    classes = {name for name in dir(module) if inspect.isclass(getattr(module, name))}
    theirs = classes | {name for cls in classes for name in dir(getattr(module, cls))}
    listed = {name for flavour in MODULES for names in used(flavour).values() for name in names}
    listed |= {cls for flavour in MODULES for cls in used(flavour)}
    plain = set(dir(str)) | set(dir(tuple)) | set(dir(dict)) | set(dir(list)) | {"clear"}
    # Of Python's logging, of our errors, and of our ranges.
    plain |= {"DEBUG", "message", "min", "opt", "max"}
    assert sorted((accessed & theirs) - own - listed - plain) == []


def test_no_flavour_is_imported_before_it_is_asked_for() -> None:
    for module in (flavours, network, running, logs):
        assert "import tensorrt" not in inspect.getsource(module)


def test_a_flavour_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    flavours._import.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install 'inferq\[tensorrt\]'$"):
            find_flavour(TENSORRT)
        with pytest.raises(
            ConfigError, match=r"pip install 'inferq\[tensorrt\]' or 'inferq\[tensorrt-rtx\]'; "
        ):
            find_flavour(AUTO)
    finally:
        flavours._import.cache_clear()


def test_an_unknown_flavour_is_refused() -> None:
    with pytest.raises(ConfigError, match="flavour is 'trt'; expected auto, tensorrt, tensorrt-rt"):
        find_flavour("trt")


def test_auto_takes_what_is_installed_and_always_the_same_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _module()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert find_flavour(AUTO) is rtx()
    assert rtx().version.startswith("1.")


def test_a_plan_is_built_without_a_gpu(tmp_path: Path) -> None:
    flavour = rtx()
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    assert [str(tensor) for tensor in network.inputs] == ["x: float32[?, 3]"]
    plan, timing = build(flavour, network, [[SPAN]])
    assert len(plan) > 1000
    assert timing is None


def test_junk_is_refused_with_the_parsers_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"junk" * 100)
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be parsed by .*Failed to parse"):
        parse(rtx(), path)


def test_an_operator_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = onnx_models.write(
        tmp_path / "model.onnx",
        [onnx_models.node("NonZero", "x", "y")],
        {"x": (onnx_models.FLOAT, ("batch", 3))},
        {"y": (onnx_models.INT64, (2, "k"))},
    )
    with pytest.raises(ConfigError, match=r"NonZero ''.*output's shape depends on the data"):
        parse(rtx(), path)


def test_a_failed_build_repeats_the_errors_that_were_logged(tmp_path: Path) -> None:
    flavour = rtx()
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    wrong = InputRange("x", (1, 2), (4, 2), (8, 2))
    with pytest.raises(ConfigError, match=r"could not build the model: .*tensor has 3"):
        build(flavour, network, [[wrong]])


@pytest.mark.parametrize(
    "span",
    [InputRange("x", (8, 3), (4, 3), (1, 3)), InputRange("x", (1,), (4,), (8,))],
    ids=["descending", "too few dims"],
)
def test_a_profile_that_makes_no_sense_is_refused(tmp_path: Path, span: InputRange) -> None:
    flavour = rtx()
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    with pytest.raises(ConfigError):
        build(flavour, network, [[span]])


class _Watch:
    """Stops after some steps."""

    def __init__(self, most: int) -> None:
        self.phases: list[tuple[str, str | None]] = []
        self.steps = 0
        self._most = most

    @property
    def stopped(self) -> bool:
        return self.steps >= self._most

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        assert steps > 0
        self.phases.append((phase, parent))

    def step(self, phase: str, done: int) -> None:
        assert done > 0
        self.steps += 1

    def finish(self, phase: str) -> None: ...


def test_progress_is_told_phase_by_phase(tmp_path: Path) -> None:
    flavour, watch = rtx(), _Watch(1 << 30)
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    build(flavour, network, [[SPAN]], progress=watch)
    (first, no_parent), *rest = watch.phases
    assert no_parent is None
    assert first in {parent for _, parent in rest}
    assert watch.steps > 3


def test_a_build_can_be_stopped(tmp_path: Path) -> None:
    flavour, watch = rtx(), _Watch(2)
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    with pytest.raises(BuildStopped):
        build(flavour, network, [[SPAN]], progress=watch)
    assert watch.steps == 2


def test_what_is_no_plan_is_not_usable() -> None:
    assert why_unusable(rtx(), b"junk" * 500) == "malformed engine"


def test_a_plan_that_cannot_be_loaded_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="could not load the plan"):
        deserialize(rtx(), b"junk" * 500)


def test_data_dependent_outputs_are_found_and_the_network_is_left_as_it_was(
    tmp_path: Path,
) -> None:
    shape = ("batch", 3)
    path = onnx_models.write(
        tmp_path / "model.onnx",
        [
            onnx_models.node("Shape", "x", "s"),
            onnx_models.node("Gather", ["s", "zero"], ["rows"]),
            onnx_models.node("Mul", ["rows", "three"], ["n"]),
            onnx_models.node("Reshape", ["x", "n"], ["flat"]),
        ],
        {"x": (onnx_models.FLOAT, shape)},
        {"flat": (onnx_models.FLOAT, ("many",))},
        [onnx_models.ints("zero", [1], [0]), onnx_models.ints("three", [1], [3])],
    )
    flavour = rtx()
    network = parse(flavour, path)
    assert network.outputs[0].shape == (None,)
    assert data_dependent(network, {"x": (4, 3)}) == ()
    plan, _ = build(flavour, network, [[SPAN]])
    assert plan


def test_the_log_goes_to_python_and_errors_into_exceptions_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flavour = rtx()
    with caplog.at_level(logging.INFO, "inferq.workers.trt.logs"):
        network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
        build(flavour, network, [[SPAN]])
        assert not caplog.records
        with pytest.raises(ConfigError, match="no optimization profile has been defined"):
            build(flavour, network, [])
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "no optimization profile has been defined" in record.message


def test_the_timing_cache_is_handed_on_where_the_flavour_has_one(tmp_path: Path) -> None:
    """TensorRT-RTX still has the calls, without effect: enough to see that they are right."""
    module = _module()
    # A copy of its own: TensorRT takes one logger per process, so the logger is shared.
    flavour = Flavour(RTX, module)
    flavour.logger, flavour.errors = rtx().logger, rtx().errors
    flavour.name = TENSORRT
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    with pytest.warns(DeprecationWarning, match="no-ops"):
        _, timing = build(flavour, network, [[SPAN]], capability="9.0")
    assert timing
    with pytest.warns(DeprecationWarning, match="no-ops"):
        _, again = build(flavour, network, [[SPAN]], capability="9.0", timing_cache=timing)
    assert again


def test_the_workspace_can_be_limited(tmp_path: Path) -> None:
    flavour = rtx()
    network = parse(flavour, onnx_models.double(tmp_path / "model.onnx"))
    assert build(flavour, network, [[SPAN]], workspace_bytes=1 << 20)[0]


def test_an_import_that_fails_in_its_own_way_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("libnvinfer is damaged")

    monkeypatch.setitem(sys.modules, "tensorrt", Broken("tensorrt"))
    flavours._import.cache_clear()
    try:
        with pytest.raises(ConfigError, match="libnvinfer is damaged"):
            find_flavour(TENSORRT)
    finally:
        flavours._import.cache_clear()
