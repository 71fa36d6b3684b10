"""A fake of the few calls of ``torch.cuda`` that a lane makes, on host memory. No GPU.

It notes the calls in their order; operators run at once, on the CPU. Arguments are held against the
signatures of the installed PyTorch, whose Python classes are the same without CUDA.

Importing this needs PyTorch: call ``pytest.importorskip("torch")`` before.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from inferq.shared.schema import DTYPES, Array
from inferq.workers.engines import torch_executor

_REAL_GRAPH = torch.cuda.CUDAGraph
#: What waits for the whole device, or makes another lane wait for it.
DEVICE_WIDE = ("synchronize", "empty_cache", "graph")


class FakeCuda:
    """In place of ``torch.cuda``, as long as a test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._threads = threading.local()
        #: What the next calls of these names raise.
        self.raises: dict[str, Exception] = {}
        self.views = 0
        self._pools = 0
        self._memory: list[Array] = []
        fake = self

        class Stream:
            def __init__(self, handle: int = 1) -> None:
                self.handle = handle

            def synchronize(self) -> None:
                fake.note(f"synchronize stream {self.handle}")

        class Graph:
            def __init__(self) -> None:
                self.pool: int | None = None

            def capture_begin(self, *args: Any, **kwargs: Any) -> None:
                given = inspect.signature(_REAL_GRAPH.capture_begin).bind(self, *args, **kwargs)
                self.pool = given.arguments["pool"]
                fake.note(f"capture_begin pool {self.pool} {given.arguments['capture_error_mode']}")
                fake.begun(self)

            def capture_end(self) -> None:
                fake.note("capture_end")
                fake.ended(self)

            def replay(self) -> None:
                fake.note("replay")
                fake.replayed(self)

            def reset(self) -> None:
                fake.note("reset")
                fake.dropped(self)

        @contextmanager
        def stream(chosen: Any) -> Iterator[None]:
            fake.current.append(chosen.handle)
            try:
                with fake.operators(chosen.handle):
                    yield
            finally:
                fake.current.pop()

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self._new_pool)
        for name in DEVICE_WIDE:
            monkeypatch.setattr(torch.cuda, name, lambda *_, called=name, **__: self.note(called))
        monkeypatch.setattr(torch_executor, "tensor_at", self._tensor_at)

    @property
    def current(self) -> list[int]:
        """The streams that are current in this thread, the innermost last."""
        streams: list[int] = self._threads.__dict__.setdefault("streams", [])
        return streams

    def note(self, call: str) -> None:
        """A call, and the stream that is current then."""
        self.calls.append(f"{call} on {self.current[-1]}" if self.current else call)
        raised = self.raises.get(call.split(maxsplit=1)[0])
        if raised is not None:
            raise raised

    @contextmanager
    def operators(self, stream: int) -> Iterator[None]:
        """What is done with the operators that are called on `stream`: nothing, they run."""
        yield

    def begun(self, graph: Any) -> None:
        """A capture, on the current stream."""

    def ended(self, graph: Any) -> None:
        """The same."""

    def replayed(self, graph: Any) -> None:
        """On the current stream."""

    def dropped(self, graph: Any) -> None:
        """It is not needed any more."""

    def memory(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory of the "device", to be told apart by its ``ctypes.data``."""
        self._memory.append(np.zeros(shape, DTYPES[dtype]))
        return self._memory[-1]

    def _new_pool(self) -> int:
        self._pools += 1
        return self._pools

    def _tensor_at(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        self.views += 1
        of = getattr(torch, dtype)
        count = math.prod(shape)
        raw = (ctypes.c_char * max(1, count * of.itemsize)).from_address(address)
        return torch.frombuffer(raw, dtype=of, count=count).reshape(shape)
