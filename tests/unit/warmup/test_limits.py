"""What memory is left is read from cgroups of both versions, at every level."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from inferq.workers.warmup import limits
from inferq.workers.warmup.limits import Limit, was_killed

MB = 1 << 20


class Kernel:
    """A /proc and cgroup file systems, as files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.write("proc/meminfo", "MemTotal: 8192 kB\nMemAvailable: 2048 kB\n")
        self.write("proc/vmstat", "nr_free_pages 5\noom_kill 3\n")
        self.mounts: list[str] = []

    def write(self, path: str, text: str) -> None:
        file = self._root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def mount(self, kind: str, root: str, at: str, options: str) -> None:
        place = self._root / at
        self.mounts.append(f"31 25 0:28 {root} {place} rw,nosuid - {kind} cgroup {options}")
        self.write("proc/self/mountinfo", "\n".join(self.mounts) + "\n")

    def version_2(self, folder: str, most: str, current: int, **stat: int) -> None:
        self.write(f"{folder}/memory.max", f"{most}\n")
        self.write(f"{folder}/memory.current", f"{current}\n")
        self.write(f"{folder}/memory.stat", "".join(f"{k} {v}\n" for k, v in stat.items()))
        self.write(f"{folder}/memory.events", "low 0\noom 2\noom_kill 1\n")

    def version_1(self, folder: str, most: int, used: int, **stat: int) -> None:
        self.write(f"{folder}/memory.limit_in_bytes", f"{most}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", "".join(f"{k} {v}\n" for k, v in stat.items()))
        self.write(f"{folder}/memory.oom_control", "oom_kill_disable 0\noom_kill 4\n")

    def cgroups(self) -> list[Limit]:
        return [each for each in limits.limits(self.proc) if each.name.startswith("the cgroup")]


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_the_limit_of_a_parent_counts_too(kernel: Kernel) -> None:
    kernel.mount("cgroup2", "/", "cg", "rw")
    kernel.write("proc/self/cgroup", "0::/pod/box\n")
    kernel.version_2("cg/pod/box", "max", 100 * MB)
    kernel.version_2("cg/pod", str(300 * MB), 200 * MB)
    (limit,) = kernel.cgroups()
    assert limit.name.endswith("cg/pod")
    assert (limit.limit, limit.left) == (300 * MB, 100 * MB)


def test_what_the_kernel_would_give_up_first_is_not_used(kernel: Kernel) -> None:
    kernel.mount("cgroup2", "/", "cg", "rw")
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.version_2(
        "cg",
        str(300 * MB),
        250 * MB,
        inactive_file=100 * MB,
        active_file=50 * MB,
        file_mapped=30 * MB,
    )
    assert kernel.cgroups()[0].used == 130 * MB


def test_memory_high_is_a_limit(kernel: Kernel) -> None:
    kernel.mount("cgroup2", "/", "cg", "rw")
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.version_2("cg", "max", 10 * MB)
    kernel.write("cg/memory.high", f"{200 * MB}\n")
    assert kernel.cgroups()[0].limit == 200 * MB


def test_version_1_is_read_beside_an_empty_version_2(kernel: Kernel) -> None:
    kernel.mount("cgroup", "/", "cg/cpu", "rw,cpu")
    kernel.mount("cgroup", "/", "cg/memory", "rw,memory")
    kernel.mount("cgroup2", "/", "cg/unified", "rw")
    kernel.write("proc/self/cgroup", "4:memory:/box/inner\n1:cpu:/other\n0::/\n")
    kernel.version_1("cg/memory/box/inner", 700 * MB, 150 * MB, total_inactive_file=50 * MB)
    kernel.version_1("cg/memory/box", (1 << 63) - 4096, 900 * MB)
    kernel.version_1("cg/memory", (1 << 63) - 4096, 900 * MB)
    (limit,) = kernel.cgroups()
    assert (limit.limit, limit.used) == (700 * MB, 100 * MB)


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
def test_a_container_sees_its_own_cgroup_where_the_hierarchy_is_mounted(
    kernel: Kernel, root: str
) -> None:
    kernel.mount("cgroup", root, "cg/memory", "rw,memory")
    kernel.write("proc/self/cgroup", "4:memory:/docker/abc\n")
    kernel.version_1("cg/memory", 700 * MB, 100 * MB)
    (limit,) = kernel.cgroups()
    assert limit.limit == 700 * MB


def test_a_path_that_leads_out_is_not_followed(kernel: Kernel) -> None:
    kernel.mount("cgroup2", "/", "cg", "rw")
    kernel.write("proc/self/cgroup", "0::/../outside\n")
    kernel.version_2("cg", str(300 * MB), 0)
    kernel.version_2("outside", str(1 * MB), 0)
    assert [limit.limit for limit in kernel.cgroups()] == [300 * MB]


def test_the_machine_is_a_limit(kernel: Kernel) -> None:
    (limit,) = [each for each in limits.limits(kernel.proc) if each.name == "the machine"]
    assert (limit.limit, limit.left) == (8 * MB, 2 * MB)


def test_address_space_is_a_limit_where_there_is_one(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.write("proc/self/status", "VmSize: 300 kB\nVmPeak: 400 kB\nVmRSS: 100 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 * MB, 2 * MB))
    limit = limits.limits(kernel.proc)[0]
    assert (limit.limit, limit.used, limit.gauge) == (1 * MB, 300 * 1024, "mapped")


@pytest.mark.parametrize("text", ["", "max", "4:memory", "0::/gone\n"])
def test_what_cannot_be_read_is_no_limit(kernel: Kernel, text: str) -> None:
    kernel.mount("cgroup2", "/", "cg", "rw")
    kernel.write("proc/self/cgroup", text)
    kernel.write("cg/memory.max", "nonsense")
    assert kernel.cgroups() == []
    assert limits.limits(kernel.proc / "nowhere") == []
    assert limits.oom_kills(kernel.proc / "nowhere") == {}


def test_kills_are_told_by_cgroup_and_of_the_machine(kernel: Kernel) -> None:
    kernel.mount("cgroup2", "/", "cg", "rw")
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.version_2("cg", "max", 0)
    before = limits.oom_kills(kernel.proc)
    assert sorted(before.values()) == [1, 3]
    assert not was_killed(before, before)
    machine = {**before, "machine": 4}
    assert was_killed(before, machine)
    assert not was_killed(before, machine, own=True), "another process on this machine"
    own = {name: count + 1 for name, count in before.items() if name != "machine"}
    assert was_killed(before, own, own=True)
    assert not was_killed({}, own), "nothing was known before"


def test_this_process_tells_what_it_takes() -> None:
    found = limits.usage()
    assert 0 < found.resident <= found.resident_peak <= found.mapped_peak
