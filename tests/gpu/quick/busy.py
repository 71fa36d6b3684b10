"""Lanes, and an engine for real workers, whose kernel takes as long as it is told to.

    engine = "busy"
    [busy]
    us = 1000.0                  # of each batch, whatever its size
    width = 150528               # bytes of a row: a picture of 224 × 224 × 3
    ends_if = "/some/file"       # while it is there: removes it and ends the context by a trap

A row's answer is its first byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
from helpers.installed import install

from gpu.quick.kernels import kernels
from inferq.shared.schema import Signature, TensorSpec
from inferq.workers.cuda import device
from inferq.workers.cuda.executor import Shape
from inferq.workers.cuda.graphs import Graph, Graphs
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.cuda.splitting import RowLimit
from inferq.workers.engines.on_gpu import LANES, gpu_buckets
from inferq.workers.models.engine import Batch, Engine, LoadedModel
from inferq.workers.models.ranges import optimum_inputs
from inferq.workers.models.signatures import Declared
from inferq.workers.models.spec import ModelSpec
from inferq.workers.models.validation import TomlTable, validate

WIDTH: Final = 224 * 224 * 3


class Busy:
    """An executor: x uint8[N, W] → y float32[N, 1], in `us` by a kernel that fills the card."""

    def __init__(self, us: float, ends_if: Path | None = None) -> None:
        self._us = us
        self._ends_if = ends_if
        self._addresses: dict[str, int] = {}
        self._shape: Shape = ()

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        return shapes["x"][0]

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        kernels()  # compiled now: it cannot be while a graph is captured
        self._shape = shapes["x"]
        return {"y": (self._shape[0], 1)}

    def set_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def enqueue(self, stream: int) -> None:
        if self._ends_if is not None and self._ends_if.exists():
            self._ends_if.unlink()
            kernels().end(stream, "halt")
        x, y = self._addresses["x"], self._addresses["y"]
        rows, width = self._shape
        kernels().busy(stream, x, y, rows, width, self._us)

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        return Graph(stream, work)

    def close(self) -> None:
        self._addresses.clear()


def busy_lane(
    gpu: device.Device,
    limit: RowLimit,
    *,
    us: float,
    rows: int,
    width: int = WIDTH,
    buckets: Sequence[int] = (),
    graphs: Graphs,
    spin: bool = False,
    ends_if: Path | None = None,
) -> CudaLane:
    """To be closed."""
    return CudaLane(
        gpu,
        Busy(us, ends_if),
        {"x": "uint8"},
        {"y": "float32"},
        [{"x": (rows, width)}],
        limit,
        buckets=buckets or (rows,),
        graphs=graphs,
        spin=spin,
    )


def pictures(rows: int, width: int = WIDTH, first: int = 0) -> Batch:
    """Requests of one row each, told apart by their first bytes: `first`, `first` + 1, …"""
    rng = np.random.default_rng(first)
    parts = []
    for row in range(rows):
        x = rng.integers(0, 256, (1, width), np.uint8)
        x[0, 0] = (first + row) % 256
        parts.append({"x": x})
    return Batch(parts, rows, rows)


def wrong_rows(batch: Batch, outputs: Mapping[str, Any]) -> int:
    """How many of the rows of `outputs` are another row's."""
    wanted = [float(part["x"][0, 0]) for part in batch.parts]
    return sum(float(got) != want for got, want in zip(outputs["y"][:, 0], wanted, strict=True))


class _Table(TomlTable):
    us: float = 1000.0
    width: int = WIDTH
    ends_if: str = ""


class BusyEngine(Engine):
    """Serves `Busy`."""

    name = "busy"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._table = validate(_Table, spec.engine_table, "busy.")

    @classmethod
    def read(cls, path: Path | None, table: Mapping[str, Any]) -> Declared:
        width = validate(_Table, table, "busy.").width
        x, y = TensorSpec("x", "uint8", ("batch", width)), TensorSpec("y", "float32", ("batch", 1))
        return Declared(Signature((x,), (y,)))

    def load(self) -> LoadedModel:
        spec, table = self.spec, self._table
        buckets, limit = gpu_buckets(spec), RowLimit()
        graphs = Graphs(not table.ends_if)  # a graph would not look at the file
        with ExitStack() as stack:
            gpu = stack.enter_context(device.acquired())
            lanes: list[CudaLane] = []
            for _ in range(spec.config.lanes or LANES):
                lane = busy_lane(
                    gpu,
                    limit,
                    us=table.us,
                    rows=spec.max_batch_size,
                    width=table.width,
                    buckets=buckets,
                    graphs=graphs,
                    ends_if=Path(table.ends_if) if table.ends_if else None,
                )
                stack.callback(lane.close)
                lanes.append(lane)
            return LoadedModel(
                spec,
                "cuda",
                lanes,
                buckets=buckets,
                optimum=optimum_inputs(spec),
                runs_to_be_warm=2,
                free=stack.pop_all().close,
            )


def install_engine(site: Path) -> None:
    """Make the folder `site`, on a worker's path, tell the worker of the engine."""
    points = {"inferq.engines": {"busy": f"{BusyEngine.__module__}:{BusyEngine.__name__}"}}
    install(site, "inferq-gpu-quick", points)


def write_model(root: Path, name: str, toml: str) -> None:
    """A model of that engine in the repository `root`; `toml`: the engine's table, mostly."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "model.toml").write_text(f'engine = "busy"\n{toml}')
