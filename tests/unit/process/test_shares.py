"""Worker processes that share a device share cores, memory for requests, and the device's memory.

What one process by itself may take is as if nobody could share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferq.workers.cuda import memory_share
from inferq.workers.data_plane.budget import budget_bytes
from inferq.workers.engines import torch
from inferq.workers.engines.cores import usable_cores
from inferq.workers.engines.onnx_options import Table, cuda_options
from inferq.workers.process import shares
from inferq.workers.warmup.forecast import Forecast
from inferq.workers.warmup.limits import Gauge, Limit, Usage

GB = 1_000_000_000


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    shares.share_with(1)


def test_cores_are_shared_out_and_each_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("inferq.workers.engines.cores._CPU_MAX", Path(os.devnull))
    counts = {}
    for processes in (1, 2, 5, 16, 64):
        shares.share_with(processes)
        counts[processes] = usable_cores()
    assert counts == {1: 16, 2: 8, 5: 3, 16: 1, 64: 1}


def test_memory_for_requests_is_shared_out() -> None:
    alone = budget_bytes()
    shares.share_with(4)
    assert budget_bytes() == alone // 4


def test_a_process_takes_no_more_than_its_share_of_a_devices_memory() -> None:
    held = memory_share.Held()
    held.add(15 * GB)
    try:
        assert memory_share.left(80 * GB) == 80 * GB, "what is free tells"
        assert memory_share.whose() == ""
        shares.share_with(4)
        assert memory_share.left(80 * GB) == 5 * GB
        assert memory_share.whose() == " to each of 4 processes"
        held.add(10 * GB)
        assert memory_share.left(80 * GB) == 0
    finally:
        held.close()
    assert memory_share.left(80 * GB) == 20 * GB, "a model that is gone has given its memory back"


def test_onnx_runtime_is_told_of_its_share_of_a_devices_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = iter([80 * GB])
    monkeypatch.setattr(memory_share, "total_memory", lambda: next(asked))
    assert "gpu_mem_limit" not in cuda_options(Table()), "nor is the driver started for it"
    shares.share_with(4)
    assert cuda_options(Table())["gpu_mem_limit"] == str(20 * GB)
    monkeypatch.setattr(memory_share, "total_memory", lambda: None)
    assert "gpu_mem_limit" not in cuda_options(Table())


def test_pytorch_is_told_of_its_share_of_a_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", told.append)
    torch._keep_to_share()
    assert told == []
    shares.share_with(4)
    torch._keep_to_share()
    assert told == [0.25]


def _short(limit: Limit, used: int) -> str | None:
    """Why ten times of what took 1 GB does not fit a process that has `used`; None: it does."""
    peak = used
    forecast = Forecast(lambda: Usage(used, peak, used, peak), lambda: [limit], lambda: None)
    forecast.start()
    peak = used + GB
    forecast.ran(1)
    short = forecast.short(10, factor=1.0)
    return None if short is None else str(short)


def test_warm_up_leaves_the_other_processes_their_part_of_the_hosts_memory() -> None:
    roomy = Limit("the machine", 32 * GB, 2 * GB)
    assert _short(roomy, GB) is None
    shares.share_with(2)
    assert _short(roomy, GB) is None
    shares.share_with(4)
    assert _short(roomy, GB) == (
        "about 10000 MB more, and 7000 of 8000 MB of the machine, shared by 4 processes are left"
    )


def test_the_hosts_memory_is_shared_with_the_processes_of_other_devices() -> None:
    roomy = Limit("the machine", 32 * GB, 2 * GB)
    shares.share_with(1, on_host=4)
    said = _short(roomy, GB)
    assert said is not None
    assert "and 7000 of 8000 MB of the machine, shared by 4 processes are left" in said
    assert memory_share.left(80 * GB) == 80 * GB, "it has its device for itself"


def test_what_others_than_the_processes_take_is_nobodys_part() -> None:
    shares.share_with(2)
    said = _short(Limit("the machine", 32 * GB, 30 * GB), GB)
    assert said is not None
    assert "and 2000 of 16000 MB" in said


def test_a_limit_of_each_process_by_itself_is_not_shared_out() -> None:
    gauge: Gauge = "mapped"
    shares.share_with(4)
    assert _short(Limit("RLIMIT_AS (ulimit -v)", 32 * GB, GB, gauge), GB) is None
