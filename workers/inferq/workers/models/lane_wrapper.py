"""A lane around another one, which changes what goes in or what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from inferq.shared.schema import GpuTimes
from inferq.workers.models.engine import FurtherLane, Lane, LoadedModel


class WrappedLane(FurtherLane):
    """Its subclasses' `run` calls the inner lane's."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def gpu_times(self) -> GpuTimes | None:  # type: ignore[override]
        return self._lane.gpu_times

    def close(self) -> None:
        """See `FurtherLane`, as which alone it is closed."""
        close: Callable[[], None] = self._lane.close  # type: ignore[attr-defined]
        close()


def in_each(loaded: LoadedModel, wrapped: Callable[[Lane], FurtherLane]) -> LoadedModel:
    """`loaded` with each of its lanes, and of those that warm-up may open, `wrapped`."""

    def opened(further: Callable[[], FurtherLane]) -> Callable[[], FurtherLane]:
        return lambda: wrapped(further())

    return replace(
        loaded,
        lanes=[wrapped(lane) for lane in loaded.lanes],
        further_lanes=[opened(further) for further in loaded.further_lanes],
    )
