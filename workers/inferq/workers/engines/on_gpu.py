"""What engines have in common on a GPU, where model.toml does not say otherwise."""

from __future__ import annotations

from typing import Final

from inferq.workers.engines.base import EngineOptions
from inferq.workers.tuning import sizes

#: One lane's copies hide behind the other's compute.
LANES: Final = 2


def gpu_buckets(options: EngineOptions) -> tuple[int, ...]:
    """Powers of two where model.toml names none: shapes, and CUDA graphs, are to be few."""
    return options.buckets or tuple(sizes(options.max_batch_size, ()))
