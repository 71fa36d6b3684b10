"""What one lane computes with: an execution context for each optimization profile of a plan."""

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
    """An execution context for each optimization profile; `profiles`: what the inputs may be.

    A run takes the first profile that holds its shapes: they come the smallest first.
    """

    def __init__(self, profiles: Sequence[Sequence[InputRange]], outputs: Sequence[str]) -> None:
        self.contexts: list[Context] = []
        self._profiles = profiles
        self._outputs = outputs
        #: The one whose shapes were set last.
        self._current: Context

    def open(self, loaded: Loaded, graphs: bool, caches: Sequence[bytes | None]) -> None:
        """Take the device memory of all contexts. EngineError; `close` in any case."""
        for cache in caches:
            self.contexts.append(loaded.context(graphs=graphs, runtime_cache=cache))
        if len(caches) > 1:  # a context begins with the first one
            stream = driver.Stream(_NON_BLOCKING)
            for number, context in enumerate(self.contexts):
                context.set_profile(number, stream.handle)
            stream.synchronize()  # from here on they are in force on any stream

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
        context = self._current = self._holding(shapes)
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        context.infer_shapes()
        found = {name: context.shape(name) for name in self._outputs}
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineError(f"the shape of output {name!r} depends on the inputs' values")
        return found

    def set_address(self, name: str, address: int) -> None:
        for context in self.contexts:
            context.set_address(name, address)

    def enqueue(self, stream: int) -> None:
        self._current.execute(stream)

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        return Graph(stream, work)

    def close(self) -> None:
        for context in self.contexts:
            context.close()

    def _holding(self, shapes: Mapping[str, Shape]) -> Context:
        for context, ranges in zip(self.contexts, self._profiles, strict=True):
            if all(span.holds(shapes[span.name]) for span in ranges):
                return context
        raise _not_held(shapes, self._profiles)


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
