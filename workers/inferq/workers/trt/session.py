"""A model on the GPU: its plan, loaded, on lanes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from inferq.workers.cuda import device
from inferq.workers.models.spec import ModelSpec
from inferq.workers.trt.builder import BuildRequest, ensure_plan
from inferq.workers.trt.flavours import Flavour
from inferq.workers.trt.lanes import Opened, opened, runs_on
from inferq.workers.trt.plans import Plan, PlanFolder, runtime_cache_name
from inferq.workers.trt.running import Context
from inferq.workers.trt.verify import verify_plan

logger = logging.getLogger(__name__)


@contextmanager
def opened_session(
    spec: ModelSpec,
    flavour: Flavour,
    precision: str,
    *,
    lanes: int,
    buckets: Sequence[int],
    graphs: bool,
) -> Iterator[Opened]:
    """`spec`'s plan, which is built if it is not yet, on its lanes, until the end.

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
                runtime_cache=lambda profile: folder.read_cache(_cache_name(plan, profile)),
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
        _keep_compiled(folder, plan, made.contexts)
        stack.callback(_keep_compiled, folder, plan, made.contexts)
        yield made


def _keep_compiled(folder: PlanFolder, plan: Plan, contexts: Sequence[Context]) -> None:
    """For the next process: what TensorRT-RTX compiled for this GPU, by the first lane's contexts,
    one for each profile.
    """
    for profile, context in enumerate(contexts):
        compiled = context.runtime_cache()
        if compiled is not None:
            folder.write_cache(_cache_name(plan, profile), compiled)


def _cache_name(plan: Plan, profile: int) -> str:
    return runtime_cache_name(plan.path, profile)
