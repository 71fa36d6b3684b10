"""A container's memory is for all worker processes in it, and too little for each is said."""

from __future__ import annotations

import pytest

from inferq.workers.supervision.memory_for_each import too_little
from inferq.workers.warmup.limits import Limit

GIB = 1 << 30
CGROUP = Limit("the cgroup /sys/fs/cgroup", 4 * GIB, GIB)
MACHINE = Limit("the machine", 2048 * GIB, GIB)
MAPPED = Limit("RLIMIT_AS (ulimit -v)", GIB, GIB, "mapped")


def test_a_limit_that_was_meant_for_one_process_is_told_of() -> None:
    assert too_little(8, [CGROUP, MACHINE]) == (
        "8 worker processes share 4.3 GB of memory, the limit of the cgroup /sys/fs/cgroup: 0.5 GB "
        "for each; expected at least 2.1 GB for each: raise the container's limit, or serve on "
        "fewer GPUs"
    )


@pytest.mark.parametrize(
    ("processes", "known"),
    [(2, [CGROUP, MACHINE]), (1, [Limit("the cgroup /", GIB, 0)]), (8, [MACHINE]), (8, [])],
)
def test_enough_for_each_or_one_alone_is_not(processes: int, known: list[Limit]) -> None:
    assert too_little(processes, known) is None


def test_what_each_process_has_for_itself_is_not_shared() -> None:
    assert too_little(8, [MAPPED, MACHINE]) is None


def test_the_limits_of_this_process_are_looked_at() -> None:
    assert too_little(1_000_000) is not None
