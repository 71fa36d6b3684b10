"""What engines have in common on a GPU, where model.toml does not say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Signature
from inferq.workers.engines.tuning import sizes
from inferq.workers.models.engine import FurtherLane
from inferq.workers.models.spec import ModelSpec

#: One lane's copies hide behind the other's compute. Where computing is short a third one gains, or
#: a fourth: then warm-up opens them.
LANES, MOST_LANES = 2, 4
#: `Engine.rounding` there: 1e-3 of an output's largest value. Not measured on a card yet.
ROUNDING: Final = 50.0
#: The second run of a size is captured as a CUDA graph, the third is the first launch of it.
WARM_RUNS: Final = 3


def further_lanes(
    spec: ModelSpec, opens: Callable[[], FurtherLane]
) -> Sequence[Callable[[], FurtherLane]]:
    """`LoadedModel.further_lanes`, each opened by `opens`; none where model.toml says how many."""
    return () if spec.config.lanes else (opens,) * (MOST_LANES - LANES)


def check_names(signature: Signature, where: str) -> None:
    """A lane's memory is told apart by names. ConfigError: an input and an output share one.

    `where`: what model.toml says that makes it so.
    """
    shared = {each.name for each in signature.inputs} & {each.name for each in signature.outputs}
    for name in sorted(shared):
        raise ConfigError(
            f"an input and an output of the model are called {name!r}; expected each name once "
            f"with {where}"
        )


def gpu_buckets(spec: ModelSpec) -> tuple[int, ...]:
    """Powers of two where model.toml names none: shapes, and CUDA graphs, are to be few."""
    return spec.config.buckets or tuple(sizes(spec.max_batch_size, ()))
