"""TensorRT's Python bindings without its libraries: enough to look at names, not to run anything.

The wheel tensorrt-cu13-bindings holds the Python module alone. Its libraries come from the vendor,
but it imports against any that have the few C functions which it names: they are made here, from
what the module itself says that it needs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

MODULE = "tensorrt_bindings"


def why_not() -> str | None:
    """Why the stubs cannot be made here; None if they can."""
    if importlib.util.find_spec(MODULE) is None:
        return "tensorrt-cu13-bindings is not installed: make .venv/.gpu-ready"
    missing = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    return f"{' and '.join(missing)}: not installed" if missing else None


def build(folder: Path) -> Path:
    """Make the libraries in `folder`, for LD_LIBRARY_PATH."""
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.origin is not None
    module = str(next(Path(spec.origin).parent.glob("tensorrt*.so")))
    needed = re.findall(r"\[(libnv[^\]]+)\]", _run("readelf", "-d", module))
    undefined = _run("nm", "-D", "--undefined-only", "-f", "just-symbols", module).split()
    # What has a version comes from the C library; Python's own names begin with Py.
    functions = [name for name in undefined if re.fullmatch(r"(create|get|init)\w+", name)]
    source = folder / "stubs.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in functions))
    empty = folder / "empty.c"
    empty.write_text("")
    for n, library in enumerate(needed):
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}"]
        _run("gcc", *flags, str(empty if n else source), "-o", str(folder / library))
    return folder


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
