"""One model's warm-up: runs its sizes on all lanes, within the available memory.

What was measured is kept under a key of the model's digest and the machine. So the next start only
runs the sizes once, and does not try one that ended a process.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferq.shared.errors import ConfigError, FatalEngineError
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.tuning import Tuning, sample, sizes
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Batch, Lane, LoadedModel
from inferq.workers.models.lane_threads import LaneThreads
from inferq.workers.models.ranges import Optimum
from inferq.workers.models.spec import ModelSpec
from inferq.workers.process.versions import installed_versions
from inferq.workers.warmup import limits
from inferq.workers.warmup.cache import Cache, Killed, files_digest, key_of
from inferq.workers.warmup.fit import Fit, lacks_memory, row_elements
from inferq.workers.warmup.forecast import Forecast
from inferq.workers.warmup.notes import Notes
from inferq.workers.warmup.runs import Runs, Warmed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A loaded model, ready for requests."""

    #: The lanes that fit.
    lanes: Sequence[Lane]
    #: Most rows of a formed batch.
    rows: int
    fit: Fit
    #: None: nothing was measured.
    tuning: Tuning | None = None
    #: Elements of the inputs of one measured row.
    row_elements: int = 0
    notes: Notes | None = None

    def serve(self) -> None:
        """Note that requests are served from now on."""
        if self.notes is not None:
            self.notes.serve()

    def keep(self, learnt: Tuning) -> None:
        """Keep what was measured, for the next start."""
        if self.notes is not None:
            self.notes.record.seconds = dict(learnt.seconds)
            self.notes.record.lanes = learnt.lanes
            self.notes.save()

    def stop_blaming(self) -> None:
        """Whatever ends this process from now on, no batch is to blame. For any thread."""
        if self.notes is not None:
            self.notes.close()


class Preparation:
    """The warm-up of one model.

    Call `start` before the engine loads: the files' digest takes time.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._digest = ""
        self._thread = threading.Thread(target=self._read, name="inferq-digest", daemon=True)
        self._notes: Notes | None = None

    def start(self) -> None:
        """Begin to read the model's files."""
        self._thread.start()

    def _read(self) -> None:
        path = self._spec.path
        try:
            self._digest = files_digest(path.parent) if path is not None else "none"
        except OSError as problem:
            logger.info("%s cannot be read: %s", path, problem.strerror)

    def stop_blaming(self) -> None:
        """Whatever ends this process from now on, no batch is to blame."""
        if self._notes is not None:
            self._notes.close()

    def prepare(self, model: LoadedModel, threads: LaneThreads) -> Prepared:
        """Warm up `model`, its lanes in their `threads`. ConfigError: it cannot run one row."""
        spec = self._spec
        tried = sizes(spec.max_batch_size, model.buckets) if spec.batchable else [1]
        killed = self._open(model) if len(tried) > 1 else None
        refused = self._refused(killed) if killed is not None else None
        if not spec.config.warm_up:
            return self._as_it_is(model, tried, killed, refused)
        first, *others = model.optimum or [Optimum({}, tried[-1])]
        if self._make(model, tried[0], first) is None:
            self._tell_untried()
            return self._as_it_is(model, tried, killed, refused)
        known = self._notes.record.seconds if self._notes is not None else {}
        runs = Runs(
            spec.name,
            model.lanes,
            threads,
            lambda size: self._batch(model, size, first),
            tried,
            forecast=Forecast(),
            notes=self._notes,
            known=known,
            refused=(killed.elements, refused) if killed is not None and refused else None,
            times=model.runs_to_be_warm,
            further=model.further_lanes,
            lanes_known=self._notes.record.lanes if self._notes is not None and known else 0,
        )
        try:
            warmed = runs.run()
            for other in others:
                fitting = [size for size in tried if size <= other.rows]
                runs.also(lambda size, other=other: self._batch(model, size, other), fitting)  # type: ignore[misc]
        except FatalEngineError:
            raise
        except Exception as problem:
            raise self._cannot_run(problem) from problem
        self._tell(warmed, len(model.lanes))
        prepared = Prepared(
            warmed.lanes,
            warmed.rows,
            self._fit(warmed.elements if warmed.why else math.inf),
            warmed.tuning,
            row_elements(self._batch(model, 1, first).parts[0]),
            self._notes,
        )
        if not known.items() >= warmed.tuning.seconds.items():
            prepared.keep(warmed.tuning)
        return prepared

    def _open(self, model: LoadedModel) -> Killed | None:
        self._thread.join()
        if not self._digest:
            return None
        spec = self._spec
        key = key_of(
            {
                "model": self._digest,
                "engine": spec.config.engine,
                "table": {name: repr(value) for name, value in spec.engine_table.items()},
                "versions": installed_versions(),
                "batch": [spec.max_batch_size, list(model.buckets), spec.batch_symbol],
                "lanes": len(model.lanes),
                "pad": {symbol: repr(rule) for symbol, rule in spec.config.pad.items()},
                "optimum": [repr(optimum) for optimum in model.optimum],
                "machine": _machine(),
            }
        )
        cache = Cache()
        cache.open()
        allowed = min((limit.limit for limit in limits.limits()), default=0)
        self._notes = Notes(cache, f"{spec.name}.{spec.version}.{key[:16]}", allowed)
        return self._notes.open()

    def _refused(self, killed: Killed) -> str:
        by = "the kernel, for want of memory" if killed.sure else "something, maybe for memory"
        place = self._notes.place if self._notes is not None else ""
        return (
            f"{killed.rows} were the last that a process ran before {by}, killed it "
            f"(to try them again, delete {place})"
        )

    def _as_it_is(
        self, model: LoadedModel, tried: Sequence[int], killed: Killed | None, refused: str | None
    ) -> Prepared:
        """The result without any run."""
        rows, elements = tried[-1], math.inf
        if killed is not None and refused is not None:
            elements = max(1, killed.elements - 1)
            if self._row() is not None:
                rows = max((size for size in tried if size < killed.rows), default=tried[0])
            self._tell_rows(rows, refused)
        return Prepared(model.lanes, rows, self._fit(elements), notes=self._notes)

    def _fit(self, elements: float) -> Fit:
        return Fit(self._spec.name, self._notes, elements, self._row())

    def _row(self) -> int | None:
        """Elements of one row of all inputs; None: rows differ."""
        total = 0
        for tensor in self._spec.signature.inputs:
            sizes_of = [dim for dim in tensor.shape[1:] if isinstance(dim, int)]
            if len(sizes_of) < len(tensor.shape[1:]):
                return None
            total += math.prod(sizes_of)
        return max(1, total)

    def _batch(self, model: LoadedModel, size: int, optimum: Optimum) -> Batch:
        batch = self._make(model, size, optimum)
        assert batch is not None
        return batch

    def _make(self, model: LoadedModel, size: int, optimum: Optimum) -> Batch | None:
        spec = self._spec
        arrays = sample(
            spec.signature, size, spec.config.pad, optimum.sizes, batchable=spec.batchable
        )
        if arrays is None:
            return None
        bucket = next((bucket for bucket in model.buckets if bucket >= size), size)
        return Batch([arrays], size, bucket, spec.batchable)

    def _cannot_run(self, problem: Exception) -> ConfigError:
        what = self._spec.path or self._spec.name
        if lacks_memory(problem):
            left = [f"{limit.left / 1e6:.0f} MB of {limit.name}" for limit in limits.limits()]
            return ConfigError(
                f"{what} has no memory for its smallest batch; left are {', '.join(left)}: "
                f"{problem}"
            )
        return ConfigError(
            f"{what} cannot run zeros to warm up (warm_up = false serves it without): {problem}"
        )

    def _tell_untried(self) -> None:
        open_dims = [
            f"dim {axis} of input {tensor}"
            for tensor in self._spec.signature.inputs
            for axis, dim in enumerate(tensor.shape)
            if axis and not isinstance(dim, int)
        ]
        logger.warning(
            "model %s is not warmed up, and what fits the memory is not known, since nothing says "
            "how large %s is; expected its sizes in model.toml, as in "
            "[profile] symbol = [smallest, optimum, largest]",
            self._spec.name,
            " or ".join(open_dims[:3]) or "an input",
            extra=about(model=self._spec.name),
        )

    def _tell(self, warmed: Warmed, lanes: int) -> None:
        if warmed.why_lanes:
            logger.warning(
                "model %s: %d of %d lanes, since %s; in model.toml, lanes = %d says so",
                self._spec.name,
                len(warmed.lanes),
                lanes,
                warmed.why_lanes,
                len(warmed.lanes),
                extra=about(model=self._spec.name),
            )
        if warmed.why:
            self._tell_rows(warmed.rows, warmed.why)

    def _tell_rows(self, rows: int, why: str) -> None:
        logger.warning(
            "model %s: batches of at most %d rows, in place of %d, since %s; in model.toml, "
            "max_batch_size = %d says so",
            self._spec.name,
            rows,
            self._spec.max_batch_size,
            why,
            rows,
            extra=about(model=self._spec.name),
        )


def _machine() -> dict[str, Any]:
    """Properties of the machine on which run times depend."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model or platform.processor(),
        "arch": platform.machine(),
        "cores": usable_cores(),
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
