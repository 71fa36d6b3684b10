"""Reads how much memory this process may still take: by its cgroups, its own limits, the machine.

It reads /proc and the cgroup file systems, version 1 and 2. A cgroup's limit applies to all cgroups
below it, so each level up to the root is read. Page cache that the kernel can drop does not count
as used.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

PROC: Final = Path("/proc")
#: A cgroup of version 1 without a limit shows nearly 2^63.
_NONE: Final = 1 << 60
_KILLS: Final = "oom_kill"

#: Which memory of this process counts against a limit: resident, or everything mapped.
Gauge = Literal["resident", "mapped"]


@dataclass(frozen=True)
class Limit:
    """A limit on memory, in bytes."""

    #: Its name in messages.
    name: str
    limit: int
    used: int
    gauge: Gauge = "resident"

    @property
    def left(self) -> int:
        return self.limit - self.used


@dataclass(frozen=True)
class Usage:
    """The memory of this process in bytes: now, and at most so far."""

    resident: int
    resident_peak: int
    mapped: int
    mapped_peak: int

    def now(self, gauge: Gauge) -> int:
        return self.resident if gauge == "resident" else self.mapped

    def peak(self, gauge: Gauge) -> int:
        return self.resident_peak if gauge == "resident" else self.mapped_peak


def usage(proc: Path = PROC) -> Usage:
    """Usage of this process. OSError, KeyError or ValueError if the kernel does not give it."""
    found = _table(proc / "self" / "status")
    resident, mapped = found["VmRSS"] * 1024, found["VmSize"] * 1024
    return Usage(
        resident,
        max(resident, found.get("VmHWM", 0) * 1024),
        mapped,
        max(mapped, found.get("VmPeak", 0) * 1024),
    )


def forget_peak(proc: Path = PROC) -> None:
    """Reset the peak of resident memory. If that is not permitted, the peak stays."""
    with suppress(OSError):
        (proc / "self" / "clear_refs").write_text("5")


def limits(proc: Path = PROC) -> list[Limit]:
    """All limits that apply to this process, as far as they can be read."""
    found = [limit for folder in _cgroups(proc) if (limit := _of_cgroup(folder)) is not None]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if most != resource.RLIM_INFINITY:
            found.append(Limit("RLIMIT_AS (ulimit -v)", most, usage(proc).mapped, "mapped"))
        memory = _table(proc / "meminfo")
        total = memory["MemTotal"] * 1024
        found.append(Limit("the machine", total, total - memory["MemAvailable"] * 1024))
    except (OSError, KeyError, ValueError):
        pass
    return found


def oom_kills(proc: Path = PROC) -> dict[str, int]:
    """How often the kernel has killed for lack of memory: by cgroup, and on the whole machine.

    The names of cgroups begin with ``/``.
    """
    found: dict[str, int] = {}
    for folder in _cgroups(proc):
        for file in ("memory.events", "memory.oom_control"):
            try:
                found[str(folder)] = _table(folder / file)[_KILLS]
            except (OSError, KeyError, ValueError):
                continue
    with suppress(OSError, KeyError, ValueError):
        found["machine"] = _table(proc / "vmstat")[_KILLS]
    return found


def was_killed(before: Mapping[str, int], now: Mapping[str, int], *, own: bool = False) -> bool:
    """Whether the kernel killed for lack of memory between the two readings of `oom_kills`.

    `own`: only in this process' own cgroups.
    """
    return any(
        now.get(name, 0) > count
        for name, count in before.items()
        if not own or name.startswith("/")
    )


def boot_id(proc: Path = PROC) -> str:
    """Identifies this boot of the machine; empty if it is not known."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, and maybe a unit."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.replace(":", " ", 1).partition(" ")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0])
    return found


def _cgroups(proc: Path) -> list[Path]:
    """The folders of the memory cgroups of this process, each before the one above it."""
    try:
        mounts = [line.split() for line in (proc / "self/mountinfo").read_text().splitlines()]
        member = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    paths = {controllers: path for _, controllers, path in (m for m in member if len(m) == 3)}
    found: list[Path] = []
    for words in mounts:
        if "-" not in words:
            continue
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup" and "memory" in options:
            path = next((p for names, p in paths.items() if "memory" in names.split(",")), None)
        elif kind == "cgroup2":
            path = paths.get("")
        else:
            continue
        if path is not None:
            found += _upwards(Path(words[4]), Path(words[3]), Path(path))
    return found


def _upwards(mount: Path, root: Path, path: Path) -> Iterator[Path]:
    """The cgroup `path`, and those above it, of the hierarchy whose `root` stands at `mount`.

    If a container's view does not show `path`, `mount` is the cgroup.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else Path()
    folder = mount / inside
    if ".." in inside.parts or not folder.is_dir():
        folder = mount
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _of_cgroup(folder: Path) -> Limit | None:
    try:
        if (folder / "memory.max").exists():
            limit, used = _version_2(folder)
        else:
            limit, used = _version_1(folder)
    except (OSError, KeyError, ValueError):
        return None
    return None if limit >= _NONE else Limit(f"the cgroup {folder}", limit, max(0, used))


def _version_2(folder: Path) -> tuple[int, int]:
    given = [
        (folder / name).read_text().strip()
        for name in ("memory.max", "memory.high")
        if (folder / name).exists()
    ]
    limit = min((int(text) for text in given if text != "max"), default=_NONE)
    stat = _table(folder / "memory.stat")
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return limit, int((folder / "memory.current").read_text()) - max(
        0, cache - stat.get("file_mapped", 0)
    )


def _version_1(folder: Path) -> tuple[int, int]:
    limit = int((folder / "memory.limit_in_bytes").read_text())
    stat = _table(folder / "memory.stat")
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return limit, int((folder / "memory.usage_in_bytes").read_text()) - max(
        0, cache - stat.get("total_mapped_file", 0)
    )
