"""What a running process holds."""

from __future__ import annotations

import os
from pathlib import Path


def held_open(pid: int) -> tuple[int, int]:
    """Threads and sockets of a process."""
    folder = Path(f"/proc/{pid}")
    sockets = 0
    for fd in (folder / "fd").iterdir():
        try:
            sockets += os.readlink(fd).startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    return len(list((folder / "task").iterdir())), sockets


def stopped(pid: int) -> bool:
    """Whether all threads of a process stand still after SIGSTOP."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # The command, in parentheses, may hold spaces; the state follows it.
        states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return set(states) == {"T"}
