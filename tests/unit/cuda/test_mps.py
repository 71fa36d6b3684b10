"""MPS is noticed by the folder that CUDA is told of, or by its daemon; neither is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferq.workers.cuda import mps


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes of this machine: two that are others', and one that has just ended."""
    root = tmp_path / "proc"
    for pid, command in {"7": b"bash\0", "31": b"/usr/bin/nvidia-cuda-mps-server\0"}.items():
        (root / pid).mkdir(parents=True)
        (root / pid / "cmdline").write_bytes(command)
    (root / "8").mkdir()
    (root / "self").mkdir()
    monkeypatch.setattr(mps, "_PROC", root)
    return root


def test_nothing_is_noticed_where_there_is_none(proc: Path) -> None:
    assert mps.noticed({}) is None
    assert mps.noticed({"CUDA_MPS_PIPE_DIRECTORY": ""}) is None


def test_a_daemon_that_runs_is_noticed(proc: Path) -> None:
    (proc / "30").mkdir()
    (proc / "30" / "cmdline").write_bytes(b"/usr/bin/nvidia-cuda-mps-control\0-d\0")
    assert mps.noticed({}) == "nvidia-cuda-mps-control is process 30"


def test_a_folder_that_cuda_is_told_of_is_noticed(proc: Path, tmp_path: Path) -> None:
    told = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert mps.noticed(told) == f"CUDA_MPS_PIPE_DIRECTORY is {tmp_path}"
    missing = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "none")}
    assert str(mps.noticed(missing)).endswith(", which is no folder: CUDA works without it")


def test_a_machine_that_tells_nothing_of_its_processes_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mps, "_PROC", tmp_path / "none")
    assert mps.noticed({}) is None
