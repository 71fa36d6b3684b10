"""`make bench`: measure everything and write build/bench.json and build/bench.png.

`python -m benchmarks.run [--quick] [--only noop,latency,models]`. All figures of one call come from
one run on one machine; --quick only shows that everything works, its figures are worth little.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import latency, models, noop, report
from benchmarks.stage import Stage, open_stage
from inferq.workers.demo.models import prepare

Section = Callable[[Stage, Path, int, float], dict[str, Any]]


def _noop(stage: Stage, folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    return noop.run(stage, folder, rounds, scale)


def _latency(stage: Stage, folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    return {"latency": latency.run(stage, folder, rounds, scale)}


def _models(stage: Stage, folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    return {"models": models.run(stage, folder, rounds, scale)}


#: Columns of the tables in a log file.
LOG_WIDTH = 110

SECTIONS: dict[str, Section] = {"noop": _noop, "latency": _latency, "models": _models}


def _machine(stage: Stage) -> dict[str, Any]:
    packages = ("inferq", "celery", "kombu", "redis", "celery-batches", "onnxruntime", "numpy")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "server": stage.redis_version,
        "packages": {package: version(package) for package in packages},
    }


def main() -> None:
    """Run the sections asked for, each on a stage of its own so that none disturbs another."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of about a minute")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--rounds", type=int, help="rounds (default 5; quick 3)")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder to write into")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only {unknown}: expected some of {', '.join(SECTIONS)}")
    rounds, scale = args.rounds or (3 if args.quick else 5), 0.1 if args.quick else 1.0

    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    figures: dict[str, Any] = {"rounds": rounds, "quick": args.quick}
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="inferq-bench-") as folder, open_stage() as stage:
            console.print(f"{name}: {rounds} rounds …")
            repository = Path(folder)
            noop.write_models(repository)
            if name == "models":
                prepare(repository)
            figures["machine"] = _machine(stage)
            figures.update(SECTIONS[name](stage, repository, rounds, scale))
    args.out.mkdir(parents=True, exist_ok=True)
    report.print_tables(figures, console)
    report.write_picture(figures, args.out / "bench.png")
    report.write_json(figures, args.out / "bench.json")
    console.print(f"wrote {args.out / 'bench.json'} and {args.out / 'bench.png'}")


if __name__ == "__main__":
    main()
