"""Plans that are not asked for any more are deleted on request, but never one that is in use."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import onnx_models
from helpers.trt import order

from inferq.shared.errors import ConfigError
from inferq.workers.cuda.libcuda import GpuKind
from inferq.workers.trt.builder import BuildRequest, ensure_plan
from inferq.workers.trt.plan_record import PlanKey, new_record
from inferq.workers.trt.plans import Plan, PlanFolder, runtime_cache_name
from inferq.workers.trt.pruning import prune


@pytest.fixture
def wanted(tmp_path: Path) -> BuildRequest:
    onnx_models.double(tmp_path / "models" / "double" / "1" / "model.onnx")
    return order(tmp_path / "models", "double")


@pytest.fixture
def folder(tmp_path: Path) -> PlanFolder:
    folder = PlanFolder(tmp_path / "plans")
    folder.open()
    return folder


@pytest.fixture
def keep(folder: PlanFolder, wanted: BuildRequest) -> Plan:
    return ensure_plan(wanted, folder)


def _other(folder: PlanFolder, key: PlanKey, name: str = "double", **change: Any) -> Plan:
    """A plan that another process, which has ended, has built."""
    other = PlanFolder(folder.path)
    changed = msgspec.structs.replace(key, **change)
    with other.lock(name, 1, changed):
        plan = other.store(new_record(changed, name, 1, 1.0), b"a plan")
    other.close()
    return plan


@pytest.mark.parametrize(
    "change",
    [{"model": "cd" * 32}, {"flavour_version": "0.1"}, {"precision": "fp16"}, {"profiles": ()}],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_asked_for_any_more_is_deleted(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan, change: dict[str, Any]
) -> None:
    old = _other(folder, keep.record.key, **change)
    for gpu in (GpuKind("NVIDIA H100", "9.0", 132), GpuKind("NVIDIA H200", "9.0", 132)):
        folder.write_cache(runtime_cache_name(old.path, gpu), b"compiled")
    (found,) = prune(folder, wanted, keep)
    assert (found.path, found.bytes, found.in_use) == (old.path, len(b"a plan"), False)
    assert not list(folder.path.glob(f"*{old.path.stem}*"))
    assert ensure_plan(wanted, folder).from_cache
    assert prune(folder, wanted, keep) == []


def test_what_others_may_ask_for_is_left(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan
) -> None:
    key = keep.record.key
    left = [
        _other(folder, key, model="cd" * 32, flavour="tensorrt"),
        _other(folder, key, model="cd" * 32, capability="8.6", gpu="NVIDIA A10, 72 SMs"),
        _other(folder, key, model="cd" * 32, capability="9.0", gpu="NVIDIA H100, 132 SMs"),
        _other(folder, key, name="double.large", model="cd" * 32),
        _other(folder, key, name="doubles", model="cd" * 32),
    ]
    assert prune(folder, wanted, keep) == []
    assert all(plan.path.exists() for plan in left)


def test_a_plan_in_use_is_left_until_it_is_not(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan
) -> None:
    old = _other(folder, keep.record.key, model="cd" * 32)
    user = PlanFolder(folder.path)
    assert user.find("double", 1, old.record.key) is not None
    (found,) = prune(folder, wanted, keep)
    assert found.in_use
    assert folder.find("double", 1, old.record.key) is not None
    folder.close()
    user.close()
    (found,) = prune(folder, wanted, keep)
    assert not found.in_use
    assert not old.path.exists()


def test_a_plan_that_is_being_built_is_left(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan
) -> None:
    old = _other(folder, keep.record.key, model="cd" * 32)
    with folder.lock("double", 1, old.record.key):
        (found,) = prune(folder, wanted, keep)
        assert found.in_use
        assert old.path.exists()


def test_a_link_is_deleted_and_not_what_it_leads_to(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    for name, target in (("aa", elsewhere), ("bb", tmp_path / "nowhere")):
        (folder.path / f"double.1.fp32.{name}.plan").symlink_to(target)
    old = _other(folder, keep.record.key, model="cd" * 32)
    assert old.path in {found.path for found in prune(folder, wanted, keep) if not found.in_use}
    assert {path.name for path in folder.path.glob("*.plan")} == {keep.path.name}
    assert elsewhere.read_bytes() == b"mine"


def test_halves_are_deleted_and_what_cannot_be_read_is_left(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    key = keep.record.key
    no_record, no_plan, altered = (
        _other(folder, key, model=each * 32) for each in ("1a", "2b", "3c")
    )
    no_record.path.with_suffix(".json").unlink()
    no_plan.path.unlink()
    altered.path.with_suffix(".json").write_bytes(b"{}")
    assert {found.path for found in prune(folder, wanted, keep)} == {no_record.path, no_plan.path}
    assert not no_record.path.exists()
    assert not no_plan.path.with_suffix(".json").exists()
    assert altered.path.exists()
    assert "is not what was stored" in caplog.text


def test_in_a_folder_that_is_read_only_nothing_can_be_deleted(
    folder: PlanFolder, wanted: BuildRequest, keep: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    _other(folder, keep.record.key, model="cd" * 32)
    real = os.open

    def read_only(path: str, flags: int, *mode: int, **more: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *mode, **more)

    monkeypatch.setattr("inferq.workers.trt.plan_lock.os.open", read_only)
    with pytest.raises(ConfigError, match="cannot be written; expected to delete plans in it"):
        prune(folder, wanted, keep)
