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


def memory_mb(pid: int, what: str = "VmRSS") -> float:
    """The memory that a process has in use (VmHWM: ever had), in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) / 1024


def stopped(pid: int) -> bool:
    """Whether all threads of a process stand still after SIGSTOP."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # The command, in parentheses, may hold spaces; the state follows it.
        states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return set(states) == {"T"}
