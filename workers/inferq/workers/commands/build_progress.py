"""Shows the progress of a build, as bars or lines, and stops it on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from inferq.workers.logs.printing import plain, say

#: How deep nested phases are shown: as lines, and as bars, which vanish again.
LINES_DEPTH: Final = 2
BARS_DEPTH: Final = 4


class Steps:
    """Follows the phases of a build, nested `most` deep, and stops it on Ctrl-C."""

    def __init__(self, most: int) -> None:
        self.stopped = False
        self._most = most
        self._depths: dict[str, int] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._depths[phase] = depth = self._depths.get(parent or "", -1) + 1
        if depth < self._most:
            self.began(phase, depth, steps)

    def step(self, phase: str, done: int) -> None:
        if self._depths.get(phase, self._most) < self._most:
            self.went_on(phase, done)

    def finish(self, phase: str) -> None:
        if self._depths.pop(phase, self._most) < self._most:
            self.ended(phase)

    def began(self, phase: str, depth: int, steps: int) -> None: ...

    def went_on(self, phase: str, done: int) -> None: ...

    def ended(self, phase: str) -> None: ...


class Lines(Steps):
    """One line for each phase, where there is no terminal."""

    def __init__(self) -> None:
        super().__init__(LINES_DEPTH)

    def began(self, phase: str, depth: int, steps: int) -> None:
        say("  " * depth + plain(phase), err=True)


class Bars(Steps):
    """A bar for each phase that is under way."""

    def __init__(self, bars: Any) -> None:
        super().__init__(BARS_DEPTH)
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def began(self, phase: str, depth: int, steps: int) -> None:
        self._tasks[phase] = self._bars.add_task("  " * depth + plain(phase), total=steps or None)

    def went_on(self, phase: str, done: int) -> None:
        self._bars.update(self._tasks[phase], completed=done)

    def ended(self, phase: str) -> None:
        self._bars.remove_task(self._tasks.pop(phase))


@contextmanager
def shown() -> Iterator[Steps]:
    """Progress on the terminal, or in lines without one; Ctrl-C stops the build meanwhile."""
    from rich.console import Console  # noqa: PLC0415 (heavy)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        steps: Steps = Lines()
        with stopping(steps):
            yield steps
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        steps = Bars(bars)
        with stopping(steps):
            yield steps


@contextmanager
def stopping(steps: Steps) -> Iterator[None]:
    """Ctrl-C only sets a flag: an exception within TensorRT's callbacks would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if steps.stopped:
            raise KeyboardInterrupt
        steps.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
