"""Workers whose memory is limited: by a cgroup of their own, or else by ``ulimit -v``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.worker import SupervisedWorker, Worker
from inferq.workers.warmup import limits

#: While the last process leaves it, a cgroup cannot be removed.
GONE_S = 10.0


@dataclass(frozen=True)
class Cap:
    """A limit on the memory of whatever is started with `command`."""

    #: As a report names it.
    kind: str
    #: The cgroup; None: there is none.
    folder: Path | None
    mb: int

    def command(self, command: list[str]) -> list[str]:
        """`command`, under this limit."""
        limiting = f"ulimit -v {self.mb * 1024}"
        if self.folder is not None:
            limiting = f"echo $$ > {self.folder / 'cgroup.procs'}"
        return ["sh", "-c", f'{limiting} && exec "$@"', "sh", *command]

    def kills(self) -> int:
        """How often the kernel has killed in it."""
        if self.folder is None:
            return 0
        for file in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                for line in (self.folder / file).read_text().splitlines():
                    name, _, count = line.partition(" ")
                    if name == "oom_kill":
                        return int(count)
        return 0


@contextmanager
def capped(mb: int, *, cgroup: bool = True) -> Iterator[Cap]:
    """A limit of `mb` MB (2^20 bytes): a cgroup, where one can be made."""
    folder = _make(mb) if cgroup else None
    if folder is None:
        yield Cap("ulimit -v", None, mb)
        return
    try:
        yield Cap(f"cgroup {folder}", folder, mb)
    finally:
        deadline = time.monotonic() + GONE_S
        while folder.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                folder.rmdir()
            time.sleep(0.01)


def _make(mb: int) -> Path | None:
    for parent in limits._cgroups(limits.PROC)[:1]:
        folder = parent / f"inferq-test-{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except OSError:
            return None
        for file in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError):
                if (folder / file).exists():
                    (folder / file).write_text(str(mb << 20))
                    return folder
        with suppress(OSError):
            folder.rmdir()
    return None


class _Capped(Worker):
    """A worker under `cap`; None: it has no limit."""

    def __init__(self, cap: Cap | None, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._cap = cap

    def _command(self) -> list[str]:
        command = super()._command()
        return command if self._cap is None else self._cap.command(command)


class CappedWorker(_Capped, SupervisedWorker):
    """``inferq worker`` under `cap`."""


class CappedProcess(_Capped):
    """The worker process alone, which nobody replaces, under `cap`."""
