"""A model on the GPU: its plan, loaded, on lanes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from inferq.workers.cuda import device
from inferq.workers.cuda.lane import CudaLane
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.builder import Order, ensure_plan
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.lanes import opened, runs_on
from inferq.workers.trt.plans import Plan, PlanFolder, runtime_cache_name
from inferq.workers.trt.running import Context
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
        #: What is to be freed.
        self._stack = ExitStack()
        self._plan: Plan | None = None
        #: The first lane's, one for each profile.
        self._contexts: Sequence[Context] = ()
        self.lanes: Sequence[CudaLane] = ()

    def open(self) -> None:
        """ConfigError: no plan of the model can be had, or it does not fit, or answers wrongly.

        EngineError, FatalEngineError: CUDA failed meanwhile.
        """
        with ExitStack() as stack:
            gpu = stack.enter_context(device.acquired())
            stack.callback(self._folder.close)
            order = Order(self._spec, self._flavour, self._precision, capability=gpu.capability)
            with gpu:  # a build measures kernels on it
                plan = ensure_plan(order, self._folder)
            # With both, TensorRT would capture what is being captured.
            own = self._flavour.has_own_graphs
            made = stack.enter_context(
                opened(
                    gpu, self._flavour, plan.load(),
                    count=self._count,
                    buckets=self._buckets,
                    own_graphs=self._graphs and own,
                    cuda_graphs=self._graphs and not own,
                    runtime_cache=lambda profile: self._folder.read_cache(
                        self._cache_name(plan, profile)
                    ),
                )
            )  # fmt: skip
            if not plan.record.verified:
                run = runs_on(made.lanes[0], batchable=self._spec.batchable)
                checked = verify_plan(order, self._folder, plan, run)
                logger.info(
                    "%s: differs from ONNX Runtime by %.2g at most",
                    self._spec.name, checked.record.max_error,
                )  # fmt: skip
            self._plan, self.lanes, self._contexts = plan, made.lanes, made.contexts
            self._keep_compiled()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Free all of it. Idempotent."""
        if self.lanes:
            self._keep_compiled()
        self.lanes = self._contexts = ()
        self._stack.close()

    def _keep_compiled(self) -> None:
        """For the next process: what TensorRT-RTX compiled for this GPU."""
        for profile, context in enumerate(self._contexts):
            compiled = context.runtime_cache()
            if compiled is not None and self._plan is not None:
                self._folder.write_cache(self._cache_name(self._plan, profile), compiled)

    @staticmethod
    def _cache_name(plan: Plan, profile: int) -> str:
        return runtime_cache_name(plan.path, profile)
