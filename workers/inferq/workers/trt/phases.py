"""Tells a build's `Progress` of what TensorRT does not: the phases before and after its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from inferq.workers.trt.flavours import BuildStopped, Progress


@contextmanager
def phase(progress: Progress | None, name: str, steps: int = 0) -> Iterator[None]:
    """What is done within is shown as `name`, of so many steps (0: not known). BuildStopped."""
    if progress is None:
        yield
        return
    stop_if_asked(progress)
    progress.start(name, None, steps)
    try:
        yield
    finally:
        progress.finish(name)
    stop_if_asked(progress)


def stepped(progress: Progress | None, name: str, done: int) -> None:
    """So many steps of the phase `name` are over. BuildStopped."""
    if progress is not None:
        progress.step(name, done)
        stop_if_asked(progress)


def stop_if_asked(progress: Progress | None) -> None:
    """BuildStopped if the build is to be broken off."""
    if progress is not None and progress.stopped:
        raise BuildStopped
