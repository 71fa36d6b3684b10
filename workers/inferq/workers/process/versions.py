"""The versions that tell workers apart, read from what is installed: nothing is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

#: What they are called here → the distributions that may bring them, the first one found counts.
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
    """Package → version, of Python itself and of those that are installed."""
    found = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found.setdefault(name, version(distribution))
            except PackageNotFoundError:
                continue
    return found
