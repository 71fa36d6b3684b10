"""What runs for the length of a ``with`` block: a process, or a thread."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Scoped:
    """Begins with the block and ends with it; `_explain` tells why, if either fails."""

    def _begin(self) -> None:
        """Called as the block begins."""

    def _explain(self) -> None:
        """Called where the start or the block failed, before the end."""

    def _end(self) -> None:
        """Called in any case, also after a start that failed."""

    def __enter__(self) -> Self:
        try:
            self._begin()
        except BaseException:
            self._explain()
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._explain()
        self._end()
