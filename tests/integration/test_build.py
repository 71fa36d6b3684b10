"""``inferq build`` makes plans of real models, shows how far it is, and takes no altered plan."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from helpers import onnx_models
from helpers.trt import order, rtx

from inferq.shared.errors import ConfigError
from inferq.workers.commands import build_progress
from inferq.workers.commands.build import build
from inferq.workers.demo.models import MAGIKA, ORIENTATION, prepare
from inferq.workers.trt.builder import ensure_plan
from inferq.workers.trt.phases import BuildStopped, phase, stepped
from inferq.workers.trt.plan_lock import locked
from inferq.workers.trt.plans import PlanFolder
from inferq.workers.trt.precision import prepare as prepare_onnx
from inferq.workers.trt.verify import make_samples, verify


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models."""
    rtx()
    root = tmp_path_factory.mktemp("models")
    try:
        prepare(root)
    except ConfigError as problem:
        pytest.skip(problem.message)
    return root


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    return tmp_path / "plans"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of a machine without one, wherever they run."""
    monkeypatch.setattr("inferq.workers.cuda.libcuda.gpu_kind", lambda: None)


def _build(models: Path, plans: Path, model: str, *options: str) -> Result:
    arguments = [model, "--models", str(models), "--plans", str(plans)]
    return CliRunner().invoke(build, [*arguments, "--flavour", "tensorrt-rtx", *options])


def test_json_tells_the_same_and_nothing_else_is_on_stdout(models: Path, plans: Path) -> None:
    for from_cache in (False, True):
        run = _build(models, plans, MAGIKA, "--json", "--batch", "1,4,16")
        assert run.exit_code == 0, run.output
        told = json.loads(run.stdout)
        assert told["from_cache"] is from_cache
        assert Path(told["path"]).stat().st_size == told["bytes"]
        assert (told["model"], told["flavour"], told["precision"]) == (
            MAGIKA,
            "tensorrt-rtx",
            "fp32",
        )
        assert (told["verified"], told["max_error"]) == (False, None)
        assert "max_batch_size = 16" in told["model_toml"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", [MAGIKA, ORIENTATION])
def test_real_models_are_built_and_then_taken_from_the_cache(
    models: Path, plans: Path, model: str, precision: str
) -> None:
    built = _build(models, plans, model, "--precision", precision)
    assert built.exit_code == 0, built.output
    assert "Building engine" in built.stderr
    line = built.stdout.splitlines()[0]
    path, size, seconds = re.match(
        r"(\S+\.plan): (\S+) MB, built in (\S+) s by tensorrt-rtx \S+ as fp", line
    ).groups()  # type: ignore[union-attr]
    assert float(size) == pytest.approx(Path(path).stat().st_size / 1e6, abs=0.06)
    assert float(seconds) < 60
    assert line.endswith("unverified: no GPU here; the first worker that loads it verifies it")
    again = _build(models, plans, model, "--precision", precision)
    assert again.exit_code == 0
    assert "from the cache" in again.stdout
    assert "Building engine" not in again.stderr


def test_fp16_makes_a_smaller_plan(models: Path, plans: Path) -> None:
    folder = PlanFolder(plans)
    fp32, fp16 = (
        ensure_plan(order(models, MAGIKA, precision=precision), folder)
        for precision in ("fp32", "fp16")
    )
    assert fp16.record.bytes < 0.8 * fp32.record.bytes


@pytest.mark.parametrize("model", [MAGIKA, ORIENTATION])
def test_the_fp16_that_is_built_answers_as_the_model_does(models: Path, model: str) -> None:
    """On ONNX Runtime, which needs no GPU for it."""
    ordered = order(models, model, batch=(1, 2, 4), precision="fp16")
    assert ordered.spec.path is not None
    converted = prepare_onnx(ordered.spec.path, "fp16")
    session = ort.InferenceSession(converted, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    error = verify(
        lambda inputs: dict(zip(names, session.run(names, inputs), strict=True)),
        ordered.spec,
        make_samples(ordered.spec, ordered.profiles[0]),
        precision="fp16",
    )
    assert 0 < error < 0.02


def test_an_altered_byte_is_refused_until_it_is_built_anew(models: Path, plans: Path) -> None:
    _build(models, plans, MAGIKA)
    (path,) = plans.glob("*.plan")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused = _build(models, plans, MAGIKA)
    assert refused.exit_code == 1
    assert f"{path} is not what was stored" in refused.stderr
    assert f"delete {path}" in refused.stderr
    assert _build(models, plans, MAGIKA, "--force").exit_code == 0
    assert "from the cache" in _build(models, plans, MAGIKA).stdout


def test_options_say_what_workers_have_to_be_told(
    models: Path, plans: Path, tmp_path: Path
) -> None:
    models = Path(shutil.copytree(models, tmp_path / "models"))
    toml = models / ORIENTATION / "model.toml"
    options = ["--batch", "1,4,8", "--precision", "fp16"]
    built = _build(models, plans, ORIENTATION, *options)
    said = built.stdout.splitlines()[2:]
    assert said == [
        "workers take this plan if model.toml says:", 'engine = "tensorrt"', "max_batch_size = 8",
        "[tensorrt]", 'precision = "fp16"', "[profile]", "N = [1, 4, 8]",
    ]  # fmt: skip
    toml.write_text("\n".join(said[1:]))
    built = _build(models, plans, ORIENTATION)
    assert "from the cache" in built.stdout
    assert "workers take this plan" not in built.stdout


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--batch", "8,1"], "--batch is '8,1'; expected three ascending sizes"),
        (["--precision", "int8"], "Invalid value for '--precision'"),
        (["--verify", "/no/such/file"], "/no/such/file cannot be read: No such file"),
    ],
)
def test_wrong_options_are_named(
    models: Path, plans: Path, options: list[str], problem: str
) -> None:
    refused = _build(models, plans, MAGIKA, *options)
    assert refused.exit_code != 0
    assert problem in refused.stderr
    assert not list(plans.glob("*.plan")), "it is refused before minutes are spent"


def test_the_variable_means_the_same_to_builds_and_workers(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [ORIENTATION, "--models", str(models), "--flavour", "tensorrt-rtx", "--json"]
    monkeypatch.setenv("INFERQ_PLANS", "~/mine")
    built = CliRunner().invoke(build, arguments)
    assert Path(json.loads(built.stdout)["path"]).parent == tmp_path / "mine" == PlanFolder().path
    monkeypatch.setenv("INFERQ_PLANS", "mine")
    assert (
        "INFERQ_PLANS is 'mine'; expected an absolute"
        in CliRunner().invoke(build, arguments).stderr
    )


def test_a_network_trained_on_digits_is_built_from_torchs_export(
    tmp_path: Path, plans: Path
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    rtx()
    torch.manual_seed(0)
    digits = datasets.load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 10),
    )
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(1500).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    assert (net(x[1500:]).argmax(1) == y[1500:]).float().mean() > 0.85
    path = tmp_path / "models" / "digits" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    with pytest.warns(DeprecationWarning, match="legacy"):
        torch.onnx.export(
            net,
            (x[:2],),
            str(path),
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )
    for precision in ("fp32", "fp16"):
        built = _build(tmp_path / "models", plans, "digits", "--precision", precision)
        assert built.exit_code == 0, built.output
    digits_order = order(tmp_path / "models", "digits", batch=(1, 8, 64))
    assert str(digits_order.spec.signature) == (
        "(x: float32[batch, 1, 8, 8]) -> (y: float32[batch, 10])"
    )
    assert ensure_plan(digits_order, PlanFolder(plans)).record.key.profiles[0][0].max == (
        64,
        1,
        8,
        8,
    )


def test_a_build_of_somebody_else_is_waited_for_on_the_screen(tmp_path: Path, plans: Path) -> None:
    rtx()
    onnx_models.double(tmp_path / "models" / "double" / "1" / "model.onnx")
    assert _build(tmp_path / "models", plans, "double").exit_code == 0
    (lock,) = plans.glob("*.lock")
    with locked(lock):
        child = subprocess.Popen(
            [sys.executable, "-m", "inferq.workers.cli", "build", "double", "--models",
             str(tmp_path / "models"), "--plans", str(plans), "--flavour", "tensorrt-rtx"],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ),
        )  # fmt: skip
        assert child.stderr is not None
        seen = [child.stderr.readline() for _ in range(3)]
        assert seen[-1].startswith(f"Waiting for process {os.getpid()} on "), seen
        assert child.poll() is None
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "from the cache" in out


def test_a_pytorch_program_is_refused_in_one_line(tmp_path: Path, plans: Path) -> None:
    """Before PyTorch, which may not be installed, reads it."""
    path = tmp_path / "models" / "net" / "2" / "model.pt2"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK")
    refused = _build(tmp_path / "models", plans, "net")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines() == [
        f"Error: model 'net' has model.pt2 in {path.parent}; expected model.onnx: TensorRT builds "
        "ONNX files, which torch.onnx.export writes of a PyTorch model"
    ]


def test_the_newest_version_that_is_whole_is_built_and_the_other_named(
    tmp_path: Path, plans: Path
) -> None:
    rtx()
    root = tmp_path / "models"
    onnx_models.double(root / "double" / "1" / "model.onnx")
    (root / "double" / "2").mkdir()
    (root / "double" / "2" / "model.onnx.part").write_bytes(b"half")
    built = _build(root, plans, "double", "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["version"] == 1
    assert f"inferq: passed over: double version 2: no model in {root}/double/2" in built.stderr


def test_a_bad_value_in_the_table_names_model_toml(tmp_path: Path, plans: Path) -> None:
    onnx_models.double(tmp_path / "models" / "double" / "1" / "model.onnx")
    toml = tmp_path / "models" / "double" / "model.toml"
    toml.write_text('engine = "tensorrt"\n[tensorrt]\nprecision = "int8"')
    refused = _build(tmp_path / "models", plans, "double")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1] == (
        f"Error: {toml}: tensorrt.precision is 'int8'; expected 'fp32' or 'fp16'"
    )


def test_old_plans_are_deleted_if_that_is_asked_for(tmp_path: Path, plans: Path) -> None:
    rtx()
    models = tmp_path / "models"
    onnx_models.double(models / "double" / "1" / "model.onnx")
    assert _build(models, plans, "double").exit_code == 0
    (old,) = plans.glob("*.plan")
    onnx_models.double(models / "double" / "2" / "model.onnx", ("batch", 4))
    assert _build(models, plans, "double").exit_code == 0
    assert old.exists(), "nobody asked for it"
    built = _build(models, plans, "double", "--prune")
    assert built.exit_code == 0, built.output
    assert built.stdout.splitlines()[-1].startswith(f"deleted {old}: 0.")
    assert not list(plans.glob(f"{old.stem}.*"))
    (kept,) = plans.glob("*.plan")
    assert built.stdout.startswith(f"{kept}: ")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, plans: Path) -> None:
    rtx()
    path = tmp_path / "models" / "junk" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"junk" * 100)
    refused = _build(tmp_path / "models", plans, "junk")
    assert refused.exit_code == 1
    assert "junk/1/model.onnx" in refused.stderr


def test_an_output_that_depends_on_the_data_is_refused_in_one_line(
    tmp_path: Path, plans: Path
) -> None:
    rtx()
    onnx_models.write(
        tmp_path / "models" / "found" / "1" / "model.onnx",
        [onnx_models.node("NonZero", ["x"], ["where"])],
        {"x": (onnx_models.FLOAT, (4, 3))},
        {"where": (onnx_models.INT64, (2, "k"))},
    )
    refused = subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "build", "found",
         "--models", str(tmp_path / "models"), "--plans", str(plans), "--flavour", "tensorrt-rtx"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode == 1
    *phases, line = refused.stderr.splitlines()
    assert phases == [
        "Reading model found",
        "Hashing the model",
        "Looking for the plan",
        "Reading the network",
    ]
    assert "its output's shape depends on the data" in line


def test_ctrl_c_stops_the_build(tmp_path: Path, plans: Path) -> None:
    """On a model large enough that the build is still under way."""
    rtx()
    names = [f"t{n}" for n in range(1501)]
    nodes = [
        onnx_models.node(("Sin", "Tanh", "Exp")[n % 3], [names[n]], [names[n + 1]])
        for n in range(1500)
    ]
    shape = ("batch", 64)
    onnx_models.write(
        tmp_path / "models" / "deep" / "1" / "model.onnx",
        nodes,
        {names[0]: (onnx_models.FLOAT, shape)},
        {names[-1]: (onnx_models.FLOAT, shape)},
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "inferq.workers.cli", "build", "deep",
         "--models", str(tmp_path / "models"), "--plans", str(plans), "--flavour", "tensorrt-rtx"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert child.stderr is not None
    seen = ""
    while "Building engine" not in seen:
        line = child.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 1, (out, err)
    assert "Aborted!" in err
    assert not list(plans.glob("*.plan"))


def test_a_second_ctrl_c_is_not_swallowed() -> None:
    steps = build_progress.Steps(1)
    before = signal.getsignal(signal.SIGINT)
    with build_progress.stopping(steps):
        signal.raise_signal(signal.SIGINT)
        assert steps.stopped
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_phases_of_our_own_are_shown_and_stopped() -> None:
    shown = build_progress.Lines()
    runner = CliRunner()

    @click.command()
    def command() -> None:
        with phase(shown, "Reading"):
            stepped(shown, "Reading", 1)
            shown.stopped = True

    done = runner.invoke(command)
    assert isinstance(done.exception, BuildStopped)
    assert done.stderr == "Reading\n"
    with phase(None, "nobody looks"):
        pass


def test_progress_bars_follow_the_phases() -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    bars = Progress(console=Console(file=open(os.devnull, "w"), force_terminal=True))  # noqa: SIM115
    shown = build_progress.Bars(bars)
    shown.start("whole", None, 3)
    shown.start("part", "whole", 5)
    shown.start("deep", "part", 100)
    shown.start("deeper", "deep", 100)
    shown.start("too deep", "deeper", 100)
    shown.step("part", 2)
    shown.step("too deep", 50)
    assert [(task.description, task.completed) for task in bars.tasks] == [
        ("whole", 0),
        ("  part", 2),
        ("    deep", 0),
        ("      deeper", 0),
    ]
    shown.finish("too deep")
    shown.finish("deeper")
    shown.finish("deep")
    shown.finish("part")
    shown.finish("whole")
    assert bars.tasks == []
    shown.start("of unknown length", None, 0)
    assert bars.tasks[0].total is None


def test_the_profiles_that_were_built_are_shown(models: Path, plans: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(models / MAGIKA, root / MAGIKA)
    toml = root / MAGIKA / "model.toml"
    one = _build(root, plans, MAGIKA, "--batch", "1,4,8")
    assert "\nprofile: bytes 1x2048 … 4x2048 … 8x2048\n" in one.stdout
    knobs = 'engine = "tensorrt"\nmax_batch_size = 8\n'
    tables = "[[profile]]\nbatch = [1, 1, 1]\n[[profile]]\nbatch = [2, 4, 8]\n"
    toml.write_text(knobs + tables)
    two = _build(root, plans, MAGIKA)
    assert two.stdout.splitlines()[1:3] == [
        "profile 1 of 2: bytes 1x2048",
        "profile 2 of 2: bytes 2x2048 … 4x2048 … 8x2048",
    ]
    assert "from the cache" in _build(root, plans, MAGIKA).stdout
