"""No lane captures a graph while another does what would spoil that.

A capture is spoilt by any thread's call that waits for the whole context, whatever its mode: so
says CUDA's guide, and users saw it (NVIDIA/TensorRT #2888). A first run may do so, as it loads
kernels or chooses among them; judging an error does. So a capture is alone in the process, and the
others wait for it; they do not wait for each other.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final


class CaptureLock:
    """Held by one that captures, or by any number of others. A thread must not take it twice."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._others = 0
        self._captures = False
        #: Those that wait to be alone, and let nobody begin meanwhile.
        self._ahead = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While nobody captures."""
        with self._changed:
            while self._captures or self._ahead:
                self._changed.wait()
            self._others += 1
        try:
            yield
        finally:
            with self._changed:
                self._others -= 1
                if not self._others:
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self, timeout: float, *, ahead: bool = False) -> Iterator[bool]:
        """While nobody else does anything that takes it; False: that was not so in time.

        Others may begin as long as it is waited for, since most captures can be made later, too;
        `ahead`: they may not.
        """
        until = time.monotonic() + timeout
        with self._changed:
            self._ahead += ahead
            try:
                while self._captures or self._others:
                    left = until - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                mine = not self._captures and not self._others
                self._captures = self._captures or mine
            finally:
                self._ahead -= ahead
                if ahead:
                    self._changed.notify_all()
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._captures = False
                    self._changed.notify_all()


#: Of the process: its lanes share one context, whichever models they are of.
CAPTURES: Final = CaptureLock()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What it would free, in the thread that captures, may be memory of the card's."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
