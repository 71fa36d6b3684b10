"""`make gpu-wheels`: what `make gpu-quick` needs on a machine that reaches no registry.

In build/gpu-wheels, for CPython 3.12: PyCUDA, built here; this project; and what the worker
depends on, as wheels of the registry. Not PyTorch, NumPy and pytest, which are there. TensorRT is
left out: it is too large.

PyCUDA's build needs the CUDA toolkit, g++ and a Python 3.12 with its headers (pyenv's, or Debian's
python3.12-dev): `python3.12` on PATH, or what --python names.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from helpers.fakecuda.build_pycuda import CONSTRAINTS, build_wheel, missing, wanted_version

ROOT: Final = Path(__file__).parents[2]
OUT: Final = ROOT / "build" / "gpu-wheels"
VERSION: Final = "3.12"
#: glibc of the machine there is at least that of the newest.
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
#: The project's extras, and what is not one's.
EXTRAS: Final = ("worker", "embedded")
BESIDE: Final = ("nvidia-ml-py",)
#: Is there already; what it needs is, too.
THERE: Final = ("numpy", "torch")
MAX_BYTES: Final = 60_000_000
_HEADERS: Final = (
    "import sys, sysconfig, os; "
    "h = os.path.join(sysconfig.get_path('include'), 'Python.h'); "
    "print('%d.%d' % sys.version_info[:2], os.path.exists(h))"
)


def main() -> int:
    """Collect them; prints each with its size. Exit status 1: why not."""
    parser = argparse.ArgumentParser(prog="gpu.wheels", description=__doc__)
    parser.add_argument("--python", help=f"a Python {VERSION} with its headers")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--try", action="store_true", dest="tried",
        help="then a dry run of gpu-quick, in a new environment that holds these and what is there",
    )  # fmt: skip
    args = parser.parse_args()
    python = find_python(args.python)
    if python is None:
        print(f"no Python {VERSION} with its headers is found; expected it on PATH, or --python")
        return 1
    if (reason := missing()) is not None:
        print(f"PyCUDA cannot be built: {reason}")
        return 1
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    version = wanted_version()
    if not list(out.glob(f"pycuda-{version}-*.whl")):
        print(f"PyCUDA {version} is built for {python}: a minute or two", flush=True)
        _drop(out, "pycuda")
        build_wheel(version, python, out)
    _collect(out)
    return _tell(out) or (_try(python, out) if args.tried else 0)


def find_python(given: str | None) -> str | None:
    """The interpreter that PyCUDA is built for."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    installed = sorted(pyenv.glob(f"{VERSION}.*/bin/python"), reverse=True)
    for python in [given] if given else [f"python{VERSION}", *map(str, installed)]:
        try:
            asked = subprocess.run([python, "-c", _HEADERS], capture_output=True, text=True)
        except OSError:
            continue
        if asked.stdout.strip() == f"{VERSION} True":
            return python
    return None


def _collect(out: Path) -> None:
    """This project's wheel, and what it and PyCUDA depend on."""
    (pycuda,) = out.glob("pycuda-*.whl")
    kept = {pycuda.name}
    with tempfile.TemporaryDirectory(prefix="inferq-wheels-") as name:
        folder = Path(name)
        _pip("wheel", "--no-deps", "--wheel-dir", name, str(ROOT))
        (project,) = folder.glob("inferq-*.whl")
        # Built here, it is of no manylinux.
        platforms = [f"--platform={each}" for each in (*PLATFORMS, "linux_x86_64")]
        _pip(
            "download", "--dest", name, "--python-version", VERSION, "--implementation", "cp",
            "--only-binary=:all:", *platforms,
            f"{project}[{','.join(EXTRAS)}]", str(pycuda), *BESIDE,
        )  # fmt: skip
        for each in THERE:
            _drop(folder, each)
        for wheel in folder.glob("*.whl"):
            kept.add(wheel.name)
            (out / wheel.name).write_bytes(wheel.read_bytes())
    for wheel in out.glob("*.whl"):
        if wheel.name not in kept:
            wheel.unlink()


def _try(python: str, wheels: Path) -> int:
    """`make gpu-quick` on the fake driver, as on the machine there, but for PyTorch."""
    with tempfile.TemporaryDirectory(prefix="inferq-bare-") as name:
        subprocess.run([python, "-m", "venv", name], check=True)
        bare = f"{name}/bin/python"
        _pip("--python", bare, "install", "numpy", "pytest")
        env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        command = [bare, "-m", "gpu.quick", "--fake", "--wheels", str(wheels)]
        return subprocess.run(command, env=env, cwd=ROOT).returncode


def _drop(folder: Path, package: str) -> None:
    for wheel in folder.glob(f"{package}-*.whl"):
        wheel.unlink()


def _tell(out: Path) -> int:
    wheels = sorted(out.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    total = 0
    for wheel in wheels:
        size = wheel.stat().st_size
        total += size
        print(f"{size / 1e6:8.2f} MB  {wheel.name}")
    print(f"{total / 1e6:8.2f} MB  in {len(wheels)} wheels, of at most {MAX_BYTES / 1e6:.0f}")
    return int(total > MAX_BYTES)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "-qq", "-c", str(CONSTRAINTS)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
