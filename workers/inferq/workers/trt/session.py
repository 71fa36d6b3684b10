"""A model on the GPU: its plan, loaded, on lanes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from inferq.workers.cuda import device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.repository import ModelSpec
from inferq.workers.trt.builder import Order, ensure_plan
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.lanes import open_lanes, runs_on
from inferq.workers.trt.plans import Plan, PlanFolder
from inferq.workers.trt.running import Context, Loaded
from inferq.workers.trt.verify import verify_plan

logger = logging.getLogger(__name__)


class Session:
    """The constructor assigns; `open` builds what is not built yet, and takes the GPU's memory."""

    def __init__(
        self,
        spec: ModelSpec,
        flavour: Flavour,
        precision: str,
        *,
        lanes: int,
        buckets: Sequence[int],
        graphs: bool,
    ) -> None:
        self._spec = spec
        self._flavour = flavour
        self._precision = precision
        self._count = lanes
        self._buckets = buckets
        self._graphs = graphs
        self._folder = PlanFolder()
        self._device: device.Device | None = None
        self._loaded: Loaded | None = None
        self._plan: Plan | None = None
        #: The first lane's, one for each profile.
        self._contexts: Sequence[Context] = ()
        self.lanes: list[CudaLane] = []

    def open(self) -> None:
        """ConfigError: no plan of the model can be had, or it does not fit, or answers wrongly.

        EngineError, FatalEngineError: CUDA failed meanwhile.
        """
        self._device = gpu = device.acquire()
        try:
            order = Order(self._spec, self._flavour, self._precision, capability=gpu.capability)
            with gpu:  # a build measures kernels on it
                self._plan = plan = ensure_plan(order, self._folder)
                self._loaded = self._flavour.deserialize(plan.load())
                # With both, TensorRT would capture what is being captured.
                own = self._flavour.has_own_graphs
                self._contexts = open_lanes(
                    gpu, self._loaded, self.lanes,
                    count=self._count,
                    buckets=self._buckets,
                    own_graphs=self._graphs and own,
                    cuda_graphs=self._graphs and not own,
                    runtime_caches=[
                        self._folder.read_cache(self._cache_name(plan, profile))
                        for profile in range(self._loaded.profiles)
                    ],
                )  # fmt: skip
            if not plan.record.verified:
                run = runs_on(self.lanes[0], batchable=self._spec.batchable)
                plan = verify_plan(order, self._folder, plan, run)
                logger.info(
                    "%s: differs from ONNX Runtime by %.2g at most",
                    self._spec.name, plan.record.max_error,
                )  # fmt: skip
            self._keep_compiled()
        except BaseException as problem:
            judged = gpu.judge_loading(problem) if isinstance(problem, Exception) else problem
            self.close()
            if judged is problem:
                raise
            raise judged from problem

    def close(self) -> None:
        """Free all of it. Idempotent."""
        gpu, self._device = self._device, None
        if gpu is None:
            return
        if self.lanes:
            self._keep_compiled()
        for lane in self.lanes:
            lane.close()
        self.lanes = []
        self._contexts = ()
        with gpu:
            if self._loaded is not None:
                self._loaded.close()
            self._loaded = None
        device.release()

    def _keep_compiled(self) -> None:
        """For the next process: what TensorRT-RTX compiled for this GPU."""
        for profile, context in enumerate(self._contexts):
            compiled = context.runtime_cache()
            if compiled is not None and self._plan is not None:
                self._folder.write_cache(self._cache_name(self._plan, profile), compiled)

    @staticmethod
    def _cache_name(plan: Plan, profile: int) -> str:
        return f"runtime.{plan.path.stem}.{profile}"
