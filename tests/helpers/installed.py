"""A tiny package as pip installs it: a module and its dist-info folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    site: Path,
    distribution: str,
    points: Mapping[str, Mapping[str, str]] | str,
    modules: Mapping[str, str] | None = None,
) -> None:
    """Write into the folder `site` what a wheel of `distribution` unpacks to.

    `points`: group → name → value, or the text of entry_points.txt. `modules`: name → its source.
    """
    folder = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    if not isinstance(points, str):
        points = "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in named.items())
            for group, named in points.items()
        )
    (folder / "entry_points.txt").write_text(points + "\n")
    for name, source in (modules or {}).items():
        (site / f"{name}.py").write_text(source)
