"""Versions of installed packages, by which workers differ; nothing is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

#: Name → the distributions that may provide it; the first installed one counts.
_DISTRIBUTIONS: Final = {
    "inferq": ("inferq",),
    "celery": ("celery",),
    "redis": ("redis",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13"),
}
PACKAGES: Final = ("python", *_DISTRIBUTIONS)


def installed_versions() -> dict[str, str]:
    """Package → version, for Python and the installed packages."""
    found = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found.setdefault(name, version(distribution))
            except PackageNotFoundError:
                continue
    return found
