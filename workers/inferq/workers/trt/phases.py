"""How far a build is, in phases: TensorRT's own, and those before and after them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Is told how far a build is; called from TensorRT's threads. Phases nest by their names."""

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """`phase` begins, of `steps` steps, as a part of `parent`."""

    def step(self, phase: str, done: int) -> None:
        """`done` steps of `phase` are over."""

    def finish(self, phase: str) -> None:
        """`phase` is over, or was broken off."""

    @property
    def stopped(self) -> bool:
        """True breaks the build off at its next step."""
        ...


class BuildStopped(Exception):
    """`Progress.stopped` broke a build off."""


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
