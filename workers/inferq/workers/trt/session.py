"""A model on the GPU: its plan, loaded, on lanes."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from inferq.workers.cuda import device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.builder import BuildRequest, ensure_plan
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.lanes import opened, runs_on
from inferq.workers.trt.plans import PlanFolder, runtime_cache_name
from inferq.workers.trt.running import Loaded
from inferq.workers.trt.verify import verify_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model's plan on the GPU."""

    lanes: Sequence[CudaLane]
    #: Keeps what the lanes have compiled up to now, for later processes.
    keep_compiled: Callable[[], None]
    #: See `Opened`.
    another: Callable[[], CudaLane]


@contextmanager
def opened_session(
    spec: ModelSpec,
    flavour: Flavour,
    precision: str,
    *,
    lanes: int,
    buckets: Sequence[int],
    graphs: bool,
) -> Iterator[Session]:
    """`spec`'s plan, which is built if it is not yet, on lanes until the end.

    ConfigError: no plan of the model can be had, or it does not fit, or answers wrongly.
    EngineError, FatalEngineError: CUDA failed meanwhile.
    """
    with ExitStack() as stack:
        gpu = stack.enter_context(device.acquired())
        folder = PlanFolder()
        stack.callback(folder.close)
        order = BuildRequest(spec, flavour, precision, gpu=gpu.kind)
        with gpu:  # a build measures kernels on it
            plan = ensure_plan(order, folder)
        compiled = _Compiled(folder, runtime_cache_name(plan.path, gpu.kind))
        # With both, TensorRT would capture what is being captured.
        own = flavour.has_own_graphs
        made = stack.enter_context(
            opened(
                gpu,
                flavour,
                plan.load(),
                count=lanes,
                buckets=buckets,
                own_graphs=graphs and own,
                cuda_graphs=graphs and not own,
                spin=spec.config.gpu_wait == "spin",
                runtime_cache=compiled.read() if flavour.has_runtime_cache else None,
            )
        )
        if not plan.record.verified:
            run = runs_on(made.lanes[0], batchable=spec.batchable)
            checked = verify_plan(order, folder, plan, run)
            logger.info(
                "%s: differs from ONNX Runtime by %.2g at most",
                spec.name,
                checked.record.max_error,
            )
        keep = functools.partial(compiled.keep, made.loaded)
        stack.callback(keep)  # sizes that were not warmed up are compiled while it serves
        yield Session(made.lanes, keep, made.another)


class _Compiled:
    """What TensorRT-RTX compiles of a plan for the GPU at hand: kept for the next process."""

    def __init__(self, folder: PlanFolder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._digest = b""

    def read(self) -> bytes | None:
        """What was kept last."""
        content = self._folder.read_cache(self._name)
        self._digest = hashlib.sha256(content or b"").digest()
        return content

    def keep(self, loaded: Loaded) -> None:
        """Keep what was compiled up to now, unless it is what was kept last."""
        content = loaded.runtime_cache()
        if content is None or hashlib.sha256(content).digest() == self._digest:
            return
        self._folder.write_cache(self._name, content)
        self._digest = hashlib.sha256(content).digest()
