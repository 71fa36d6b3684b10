"""Keeps TensorRT's calls that hold the GIL apart from those that give it up.

TensorRT logs to Python, so whichever thread logs takes the GIL first, while it may hold a lock of
TensorRT's own. Its bindings (pyCore.cpp of NVIDIA/TensorRT) give the GIL up while they create
contexts, infer shapes and execute; they keep it while they set shapes, addresses and profiles, and
while they destroy anything. So one thread can log with a lock that another waits for with the GIL:
neither would ever go on. Hence the rule for what shares locks, the contexts of one plan: calls that
give the GIL up run beside each other, and a call that keeps it runs alone.
"""

from __future__ import annotations

import threading


class Calls:
    """The calls of one plan's contexts. Neither kind is made within the other.

    A call that keeps the GIL goes before those that come after it.
    """

    def __init__(self) -> None:
        lock = threading.Lock()
        #: Around a call that gives the GIL up. Lanes enqueue within it: that takes them 1 to 2 µs.
        self.giving_up_the_gil = _Beside(self, lock)
        #: Around a call that keeps the GIL.
        self.keeping_the_gil = _Alone(self, lock)
        self.changed = threading.Condition(lock)
        #: Calls that gave the GIL up, now; and those that keep it, of which one is made at most.
        self.beside = 0
        self.alone = False
        self.waiting = 0


class _Beside:
    def __init__(self, calls: Calls, lock: threading.Lock) -> None:
        self._calls = calls
        self._lock = lock

    def __enter__(self) -> None:
        calls = self._calls
        with self._lock:
            while calls.alone or calls.waiting:
                calls.changed.wait()
            calls.beside += 1

    def __exit__(self, *_: object) -> None:
        calls = self._calls
        with self._lock:
            calls.beside -= 1
            if calls.waiting and not calls.beside:
                calls.changed.notify_all()


class _Alone:
    def __init__(self, calls: Calls, lock: threading.Lock) -> None:
        self._calls = calls
        self._lock = lock

    def __enter__(self) -> None:
        calls = self._calls
        with self._lock:
            calls.waiting += 1
            try:
                while calls.alone or calls.beside:
                    calls.changed.wait()
            finally:
                calls.waiting -= 1
            calls.alone = True

    def __exit__(self, *_: object) -> None:
        calls = self._calls
        with self._lock:
            calls.alone = False
            calls.changed.notify_all()
