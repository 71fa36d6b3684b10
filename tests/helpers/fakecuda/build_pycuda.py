"""Installs PyCUDA on a machine that has the CUDA toolkit but no driver.

PyCUDA comes as source and links to libcuda, which only a driver brings; the fake one serves as
well, since nothing of it is kept. It is installed into the Python that runs this, in the version
that constraints.txt names. Takes about 90 seconds and 1.5 GB of memory. Where the toolkit or a
compiler is missing it says so and does nothing else; nor where that version is installed already.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.fakecuda import build_driver, cuda_root, why_not

CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"
#: What PyCUDA's build reads, beside its defaults. Toolkits without CURAND are common.
SETTINGS = """\
CUDA_ROOT = {root!r}
CUDADRV_LIB_DIR = [{driver!r}]
CUDA_ENABLE_CURAND = False
CXXFLAGS = ["-O1"]
LDFLAGS = ["-s"]
"""


def missing() -> str | None:
    """Why PyCUDA cannot be built here; None if it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return why_not()


def wanted_version() -> str:
    """The version of PyCUDA in constraints.txt."""
    found = re.search(r"^pycuda==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert found is not None, "constraints.txt names no pycuda"
    return found[1]


def install(version: str) -> None:
    """Fetch, build and install PyCUDA. CalledProcessError if pip fails."""
    with _source(version) as tree:
        _pip("install", "--no-deps", "--no-build-isolation", str(tree))


def build_wheel(version: str, python: str, folder: Path) -> None:
    """A wheel of PyCUDA for the interpreter `python`, which need not be this one, in `folder`.

    What builds it is fetched, too. CalledProcessError if pip fails.
    """
    with _source(version) as tree:
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(tree), python=python)


@contextmanager
def _source(version: str) -> Iterator[Path]:
    """Its source, fetched and told how it is built."""
    with tempfile.TemporaryDirectory(prefix="inferq-pycuda-") as name:
        folder = Path(name)
        driver = build_driver(folder)
        (folder / "libcuda.so").symlink_to(driver)
        source = ["--no-deps", "--no-binary", "pycuda", f"pycuda=={version}"]
        _pip("download", "--no-build-isolation", "-d", str(folder), *source)
        with tarfile.open(next(folder.glob("pycuda-*.tar.gz"))) as archive:
            archive.extractall(folder / "source", filter="data")
        tree = next((folder / "source").iterdir())
        settings = SETTINGS.format(root=str(cuda_root()), driver=str(folder))
        (tree / "siteconf.py").write_text(settings)
        yield tree


def main() -> int:
    """Install it, or say why not. Exit status 0 either way."""
    version = wanted_version()
    try:
        installed = metadata.version("pycuda")
    except metadata.PackageNotFoundError:
        installed = None
    if installed == version:
        return 0
    reason = missing()
    if reason is not None:
        print(f"PyCUDA is left out: {reason}")
        return 0
    install(version)
    return 0


def _pip(*arguments: str, python: str = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, arguments[0]]
    command += ["-qq", "-c", str(CONSTRAINTS)]
    subprocess.run([*command, *arguments[1:]], check=True)


if __name__ == "__main__":
    sys.exit(main())
