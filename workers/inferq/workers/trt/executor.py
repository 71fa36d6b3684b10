"""What one lane computes with: a plan's execution contexts, which share one block of device memory.

A context keeps its optimization profile for good. For each profile there is one whose shapes change
as batches come. A CUDA graph keeps the context that it was captured of: what a context holds of its
shapes is part of what runs, so it may not be given others as long as the graph is replayed (NVIDIA
advises one context for each captured graph, and to share their memory).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pycuda import driver

from inferq.shared.errors import EngineError, InvalidInput
from inferq.workers.cuda.graphs import Graph
from inferq.workers.models.ranges import InputRange, Shape
from inferq.workers.trt.running import Context, Loaded

_NON_BLOCKING: Final = 1


class ProfileExecutor:
    """`profiles`: what the inputs may be in each of them.

    A run takes the first profile that holds its shapes: they come the smallest first.
    """

    def __init__(
        self,
        loaded: Loaded,
        profiles: Sequence[Sequence[InputRange]],
        outputs: Sequence[str],
        *,
        own_graphs: bool,
    ) -> None:
        self._loaded = loaded
        self._profiles = profiles
        self._outputs = outputs
        self._own_graphs = own_graphs
        self._contexts: list[Context] = []
        #: By profile: those that no graph keeps.
        self._unkept: list[list[Context]] = [[] for _ in profiles]
        #: The profile whose shapes were set last, if no graph has taken its context since.
        self._current: int | None = None
        self._addresses: dict[str, int] = {}
        self._memory: driver.DeviceAllocation | None = None
        self._aux_streams: list[driver.Stream] = []
        #: What contexts change their profile on, before they run: not on the lane's.
        self._own_stream: driver.Stream | None = None

    def open(self) -> None:
        """Take the device memory, and make a context for each profile. EngineError, or PyCUDA's
        MemoryError; `close` in any case.
        """
        if self._loaded.context_bytes:
            self._memory = driver.mem_alloc(self._loaded.context_bytes)
        self._own_stream = driver.Stream(_NON_BLOCKING)
        # Streams that TensorRT makes for itself may wait for the legacy default stream.
        self._aux_streams += [driver.Stream(_NON_BLOCKING) for _ in range(self._loaded.aux_streams)]
        for profile, unkept in enumerate(self._unkept):
            unkept.append(self._new(profile))

    def _new(self, profile: int) -> Context:
        context = self._loaded.context(graphs=self._own_graphs)
        try:
            self._prepare(context, profile)
        except BaseException:
            context.close()
            raise
        self._contexts.append(context)
        return context

    def _prepare(self, context: Context, profile: int) -> None:
        if profile:  # a context begins with the first one
            assert self._own_stream is not None, "it is opened"
            context.set_profile(profile, self._own_stream.handle)
            self._own_stream.synchronize()  # from here on it is in force on any stream
        if self._memory is not None:
            context.set_memory(int(self._memory), self._loaded.context_bytes)
        if self._aux_streams:
            context.set_aux_streams([stream.handle for stream in self._aux_streams])

    def rows(self, shapes: Mapping[str, Shape]) -> int:
        (asked, *_) = (shape[0] for shape in shapes.values())
        held = [
            (ranges[0].min[0], ranges[0].max[0])
            for ranges in self._profiles
            if all(span.holds((span.min[0], *shapes[span.name][1:])) for span in ranges)
        ]
        if not held:
            raise _not_held(shapes, self._profiles)
        enough = [max(least, asked) for least, most in held if asked <= most]
        return min(enough) if enough else max(most for _, most in held)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        profile = self._current = self._holding(shapes)
        if not self._unkept[profile]:
            self._unkept[profile].append(self._new(profile))
        context = self._unkept[profile][-1]
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        context.infer_shapes()
        found = {name: context.shape(name) for name in self._outputs}
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the inputs' values")
        return found

    def set_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def enqueue(self, stream: int) -> None:
        assert self._current is not None, "shapes are set before each run but those of graphs"
        context = self._unkept[self._current][-1]
        for name, address in self._addresses.items():
            context.set_address(name, address)
        context.execute(stream)

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        profile = self._current
        assert profile is not None, "shapes are set before"
        unkept = self._unkept[profile]
        graph = _KeepingGraph(stream, work, unkept[-1], unkept)
        unkept.pop()
        self._current = None
        return graph

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        self._unkept = [[] for _ in self._profiles]
        self._aux_streams.clear()  # after the contexts that run on them
        self._own_stream = None
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def _holding(self, shapes: Mapping[str, Shape]) -> int:
        for profile, ranges in enumerate(self._profiles):
            if all(span.holds(shapes[span.name]) for span in ranges):
                return profile
        raise _not_held(shapes, self._profiles)


class _KeepingGraph(Graph):
    """A graph that keeps the context that it was captured of until it is closed."""

    def __init__(
        self, stream: int, work: Callable[[], None], context: Context, unkept: list[Context]
    ) -> None:
        super().__init__(stream, work)
        self._context = context
        self._unkept = unkept

    def close(self) -> None:
        super().close()
        # First: the last one is the one whose shapes are set.
        self._unkept.insert(0, self._context)


def _not_held(
    shapes: Mapping[str, Shape], profiles: Sequence[Sequence[InputRange]]
) -> InvalidInput:
    """The plan was not built for them. [profile] is not told to clients otherwise."""
    if len(profiles) == 1:
        for span in profiles[0]:
            axes = zip(span.min, shapes[span.name], span.max, strict=True)
            for axis, (least, size, most) in enumerate(axes):
                if not least <= size <= most:
                    return InvalidInput(
                        f"input {span.name!r}: dim {axis} is {size}; expected {least} to {most}, "
                        "for which the model was built ([profile] of model.toml)"
                    )
    given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    held = " or ".join(", ".join(map(_shown, ranges)) for ranges in profiles)
    return InvalidInput(
        f"inputs are {given}; expected {held}, for which the model was built "
        "([[profile]] of model.toml)"
    )


def _shown(span: InputRange) -> str:
    """``x [1-8, 3]``"""
    dims = (
        str(most) if least == most else f"{least}-{most}"
        for least, most in zip(span.min, span.max, strict=True)
    )
    return f"{span.name} [{', '.join(dims)}]"
