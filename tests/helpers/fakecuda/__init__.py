"""A CUDA driver without a device, for tests of code that drives one through PyCUDA.

`build_driver` compiles ``libcuda.so.1`` from libcuda.c, where its exported functions and its
environment variables are described. A test starts a process of its own with `environment`, for a
process that has loaded one libcuda cannot load another; in there `control.Control` talks to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("libcuda.c")
NOT_SUPPORTED = 801
RUN_TIMEOUT_S = 120


def cuda_root() -> Path:
    """The CUDA toolkit's folder."""
    return Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_ROOT") or "/usr/local/cuda")


def why_not() -> str | None:
    """Why the driver cannot be built here; None if it can."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    if not (cuda_root() / "include" / "cuda.h").is_file():
        return f"no CUDA toolkit in {cuda_root()} (its include/cuda.h is missing)"
    return None


def build_driver(folder: Path) -> Path:
    """Compile ``libcuda.so.1`` into `folder`; returns its path. Takes two seconds."""
    include = f"-I{cuda_root() / 'include'}"
    made = folder / "driver.o"
    flags = ["-O2", "-g", "-fPIC", "-pthread", "-Wall", "-Werror"]
    _run("gcc", *flags, include, "-c", str(SOURCE), "-o", str(made))
    defined = set(_run("nm", "-g", "--defined-only", "-f", "just-symbols", str(made)).split())
    rest = folder / "rest.c"
    missing = sorted(_declared(include) - defined)
    rest.write_text(
        "\n".join(f"int {name}(void) {{ return {NOT_SUPPORTED}; }}" for name in missing)
    )
    library = folder / "libcuda.so.1"
    link = ["-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", "-Wl,-z,nodelete"]
    _run("gcc", *link, str(made), str(rest), "-o", str(library), "-ldl")
    return library


def environment(driver: Path, **settings: object) -> dict[str, str]:
    """This process' environment, for one that loads `driver` in place of a real one.

    ``memory_mb=64`` sets FAKECUDA_MEMORY_MB, and so on.
    """
    env = {**os.environ, **{f"FAKECUDA_{name.upper()}": str(v) for name, v in settings.items()}}
    env["LD_LIBRARY_PATH"] = os.pathsep.join(
        [str(driver.parent), *filter(None, [env.get("LD_LIBRARY_PATH")])]
    )
    env.pop("CUDA_VISIBLE_DEVICES", None)
    return env


def run_python(code: str, driver: Path, **settings: object) -> str:
    """What `code` prints, run by a Python process on `driver`. AssertionError if that fails."""
    env = environment(driver, **settings)
    env["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=RUN_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _declared(include: str) -> set[str]:
    """Every function of the driver that the toolkit's headers know."""
    headers = ["-include", "cuda.h", "-include", "cudaProfiler.h", "/dev/null"]
    text = _run("gcc", "-E", "-P", "-x", "c", include, *headers)
    return set(re.findall(r"\bCUresult\s+(cu[A-Z]\w*)\s*\(", text))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout
