"""`make gpu`: see gpu/__init__. Writes build/gpu.json and prints what docs/gpu.md shows.

`python -m gpu.run [--quick] [--models magika,…] [--flavours tensorrt,tensorrt-rtx]`
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpu.checks import Expected, expect
from gpu.lanes import MAX_GROWTH_MB, Setup, growth, largest_error, open_session, speed
from gpu.models import RESNET, RESNET_PT2, lay_out
from gpu.path import recovery, whole_path
from inferq.shared.errors import FatalEngineError, InferqError
from inferq.workers.cuda import device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.demo.models import MODELS
from inferq.workers.models.repository import load_model
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.api import MODULES
from inferq.workers.trt.flavours import Flavour, find_flavour

OUT = Path("build") / "gpu.json"
PACKAGES = ("inferq", "tensorrt", "tensorrt-rtx-cu13", "pycuda", "torch", "numpy")
#: Lanes, and whether with CUDA graphs.
WAYS = ((1, True), (2, False), (2, True), (3, True))


def main() -> None:
    """Everything, one model after the other; what cannot be run is named with its reason.

    Exit status 1: something failed, or nothing was measured.
    """
    parser = argparse.ArgumentParser(prog="gpu.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    parser.add_argument("--models", default="", help="by comma; default: all")
    parser.add_argument("--flavours", default=",".join(MODULES))
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory(prefix="inferq-gpu-") as name:
        os.environ["INFERQ_PLANS"] = str(Path(name) / "plans")
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        root = Path(name) / "models"
        report = Report(console, OUT, args.quick)
        names = args.models.split(",") if args.models else [*MODELS, RESNET]
        report.found["left_out"] = lay_out(root, resnet=RESNET in names)
        report.machine()
        names = [name for name in names if name not in report.found["left_out"]]
        with suppress(Ended):
            report.on_torch(root)
            for flavour in report.flavours(args.flavours.split(",")):
                for model in names:
                    report.model(load_model(root, model), flavour)
                report.faults(root, load_model(root, MODELS[0]), flavour)
        report.show()
    raise SystemExit(report.status)


class Ended(Exception):
    """Nothing more can be run in this process."""


class Report:
    """What was found, written to `out` after each step."""

    def __init__(self, console: Console, out: Path, quick: bool = False) -> None:
        self._console = console
        self._out = out
        self._seconds = 0.2 if quick else 2.0
        self._batches = 500 if quick else 10_000
        self._expected: dict[tuple[str, str], Expected] = {}
        self.found: dict[str, Any] = {"lanes": [], "path": [], "growth": [], "faults": [],
                                      "not_run": {}, "failed": []}  # fmt: skip

    @property
    def status(self) -> int:
        """1: something failed, or nothing was measured, which is no success."""
        return 1 if self.found["failed"] or not self.found["lanes"] else 0

    def add(self, kind: str, row: Mapping[str, Any], said: str) -> None:
        """One more result."""
        self.found[kind].append(dict(row))
        self._console.print(said, highlight=False)
        self.write()

    def write(self) -> None:
        """All that is known so far."""
        self._out.parent.mkdir(parents=True, exist_ok=True)
        new = self._out.with_suffix(".new")
        new.write_bytes(msgspec.json.format(msgspec.json.encode(self.found), indent=1))
        new.replace(self._out)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """What goes wrong within is a failure of `what`, and the next step is run.

        Ended: not after an error of CUDA that stays.
        """
        try:
            yield
        except Exception as problem:
            told = problem.message if isinstance(problem, InferqError) else repr(problem)
            self.found["failed"].append(f"{what}: {told}")
            self._console.print(f"[red]{what}: {escape(told)}[/red]", highlight=False)
            self.write()
            if isinstance(problem, FatalEngineError):
                raise Ended from problem

    def machine(self) -> None:
        """The card, its driver, versions, today."""
        gpu = device.acquire()
        try:
            from pycuda import driver  # noqa: PLC0415

            free, total = gpu.memory()
            self.found["machine"] = {
                "gpu": gpu.name,
                "capability": gpu.capability,
                "gpu_mb": total / 1e6,
                "free_mb": free / 1e6,
                "cuda_driver": driver.get_driver_version(),
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "packages": {package: _version(package) for package in PACKAGES},
            }
        finally:
            device.release()
        self._console.print(self.found["machine"])

    def flavours(self, names: list[str]) -> list[Flavour]:
        """Those that are installed."""
        found: list[Flavour] = []
        for name in names:
            try:
                found.append(find_flavour(name))
            except InferqError as problem:
                self.found["not_run"][name] = problem.message
                self._console.print(f"{name}: not run here: {problem.message}")
        return found

    def model(self, spec: ModelSpec, flavour: Flavour) -> None:
        """Both precisions, all `WAYS`, every bucket."""
        for precision in ("fp32", "fp16"):
            for lanes, graphs in WAYS:
                setup = Setup(flavour, precision, lanes, graphs)
                self._one(spec, spec, setup, f"{spec.name} {flavour.name} {setup}")

    def on_torch(self, root: Path) -> None:
        """The ResNet on the torch engine, compared with ONNX Runtime on the same weights."""
        if RESNET in self.found.get("left_out", {}):
            self.found["not_run"]["torch"] = self.found["left_out"][RESNET]
            self._console.print(f"torch: not run here: {self.found['not_run']['torch']}")
            return
        right = load_model(root, RESNET)
        for precision, name in RESNET_PT2.items():
            for lanes, graphs in WAYS:
                setup = Setup(None, precision, lanes, graphs)
                self._one(load_model(root, name), right, setup, f"{RESNET} torch {setup}")

    def _one(self, spec: ModelSpec, right: ModelSpec, setup: Setup, what: str) -> None:
        with self.step(what), closing(open_session(spec, setup)) as session:
            lanes = cast("Sequence[CudaLane]", session.lanes)
            error = largest_error(right, session, self._expect(right, setup.precision))
            for bucket in spec.config.buckets:
                found = speed(spec, lanes, bucket, self._seconds)
                row = {
                    "model": right.name,
                    "lanes": setup.lanes,
                    "flavour": setup.flavour.name if setup.flavour else "torch",
                    "precision": setup.precision,
                    "graphs": setup.graphs,
                    "error": error,
                    **msgspec.structs.asdict(found),
                }
                self.add(
                    "lanes",
                    row,
                    f"{what}, batch {bucket}: {found.rows_per_s:.0f} rows/s, "
                    f"{found.share:.3f} of {found.alone_rows_per_s:.0f} alone, copies hidden "
                    f"{found.hidden:.2f}, error {error:.2g}",
                )
            if setup.lanes == 2 and setup.graphs:
                grown = growth(spec, lanes, self._batches)
                self.add("growth", {"what": what, **msgspec.structs.asdict(grown)}, f"{grown}")
                if max(grown.gpu_mb, grown.host_mb) > MAX_GROWTH_MB:
                    raise MemoryError(f"{grown}; expected at most {MAX_GROWTH_MB:g} MB")

    def _expect(self, spec: ModelSpec, precision: str) -> Expected:
        key = spec.name, precision
        if key not in self._expected:
            self._expected[key] = expect(spec, precision)
        return self._expected[key]

    def faults(self, root: Path, spec: ModelSpec, flavour: Flavour) -> None:
        """The whole path, then a sticky error in a process of its own, and in a worker."""
        toml = root / spec.name / "model.toml"
        toml.write_text(toml.read_text() + f'\n[tensorrt]\nflavour = "{flavour.name}"\n')
        for producers in (1, 3):
            what = f"{spec.name} through Redis, {producers} producers"
            with self.step(what):
                expected = self._expect(spec, "fp32")
                flow = whole_path(root, spec, producers, self._seconds * 5, {}, expected)
                row = {"model": spec.name, **msgspec.structs.asdict(flow)}
                self.add("path", row, f"{what}: {flow}")
        with self.step("sticky error"):
            run = subprocess.run(
                [sys.executable, "-m", "gpu.sticky", root, spec.name, flavour.name],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            said = (run.stdout + run.stderr).strip()[-500:]
            row = {"sticky_status": run.returncode, "said": said}
            self.add("faults", row, f"sticky error: status {run.returncode}: {said}")
            if run.returncode:
                raise RuntimeError(f"status {run.returncode}; expected 0: the lane calls it fatal")
        with self.step("recovery"):
            seconds, failed = recovery(root, spec, {})
            row = {"nothing_served_s": seconds, "failed_requests": failed}
            self.add(
                "faults", row, f"recovery: nothing served for {seconds:.1f} s, {failed} failed"
            )

    def show(self) -> None:
        """One table."""
        table = Table(title=f"{self.found['machine']['gpu']}, {self.found['machine']['date']}")
        for column in (
            "model",
            "flavour",
            "precision",
            "lanes",
            "graphs",
            "batch",
            "rows/s",
            "alone",
            "share",
            "idle",
            "hidden",
            "error",
        ):
            table.add_column(column)
        for row in self.found["lanes"]:
            table.add_row(
                row["model"],
                row["flavour"],
                row["precision"],
                str(row["lanes"]),
                "yes" if row["graphs"] else "no",
                str(row["bucket"]),
                f"{row['rows_per_s']:.0f}",
                f"{row['alone_rows_per_s']:.0f}",
                f"{row['share']:.3f}",
                f"{max(0.0, 1 - row['share']):.3f}",
                f"{row['hidden']:.2f}",
                f"{row['error']:.2g}",
            )
        self._console.print(table)
        for problem in self.found["failed"]:
            self._console.print(f"failed: {problem}", highlight=False)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
