"""Plans are found by all that they depend on, and refused if they are not what was stored."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers import onnx_models

from inferq.shared.errors import ConfigError
from inferq.workers.models.ranges import InputRange
from inferq.workers.trt import plan_record
from inferq.workers.trt.model_digest import model_digest
from inferq.workers.trt.plan_record import PlanKey, new_record
from inferq.workers.trt.plans import Plan, PlanFolder, default_folder

KEY = PlanKey(
    model="ab" * 32,
    flavour="tensorrt-rtx",
    flavour_version="1.7",
    capability="any",
    gpu="any",
    precision="fp32",
    profiles=((InputRange("x", (1, 3), (4, 3), (8, 3)),),),
)
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> PlanFolder:
    folder = PlanFolder(tmp_path / "plans")
    folder.open()
    return folder


@pytest.fixture
def plan(folder: PlanFolder) -> Plan:
    return folder.store(new_record(KEY, "digits", 2, 1.5), CONTENT)


def test_what_is_stored_is_found_and_loaded(folder: PlanFolder, plan: Plan) -> None:
    assert plan.load() == CONTENT
    found = folder.find("digits", 2, KEY)
    assert found is not None
    assert (found.path, found.record, found.from_cache) == (plan.path, plan.record, True)
    assert found.load() == CONTENT
    assert found.record.seconds == 1.5
    assert (found.record.verified, found.record.max_error) == (False, None)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "cd" * 32},
        {"flavour": "tensorrt"},
        {"flavour_version": "1.8"},
        {"capability": "9.0"},
        {"gpu": "NVIDIA H200, 132 SMs"},
        {"precision": "fp16"},
        {"profiles": ((InputRange("x", (1, 3), (4, 3), (16, 3)),),)},
        {"profiles": (*KEY.profiles, (InputRange("x", (1, 3), (4, 3), (16, 3)),))},
        {"format": plan_record.FORMAT + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_value_in_the_key_is_another_plan(
    folder: PlanFolder, plan: Plan, change: dict[str, object]
) -> None:
    assert folder.find("digits", 2, msgspec.structs.replace(KEY, **change)) is None


def test_another_model_or_version_is_another_plan(folder: PlanFolder, plan: Plan) -> None:
    assert folder.find("digits", 3, KEY) is None
    assert folder.find("letters", 2, KEY) is None


def _refused(folder: PlanFolder, file: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        folder.find("digits", 2, KEY)
    assert str(file) in caught.value.message


def test_an_altered_byte_is_refused(folder: PlanFolder, plan: Plan) -> None:
    assert plan.load() == CONTENT
    content = bytearray(CONTENT)
    content[5000] ^= 1
    plan.path.write_bytes(content)
    _refused(folder, plan.path, r"its SHA-256 is not that of its record.*: delete ")
    with pytest.raises(ConfigError, match="delete"):
        plan.load()


@pytest.mark.parametrize("size", [0, 1, len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_plan_of_another_size_is_refused(folder: PlanFolder, plan: Plan, size: int) -> None:
    plan.path.write_bytes((CONTENT * 2)[:size])
    _refused(folder, plan.path, rf"{size} bytes instead of {len(CONTENT)}.*: delete ")


def test_a_record_without_its_plan_is_none(folder: PlanFolder, plan: Plan) -> None:
    plan.path.unlink()
    record = plan.record
    assert folder.find(record.model_name, record.model_version, record.key) is None


@pytest.mark.parametrize(
    "change",
    [
        {"verified": True},
        {"max_error": 0.0},
        {"bytes": 12},
        {"bytes": "12"},
        {"sha256": "00" * 32},
        {"seal": ""},
        {"more": 1},
    ],
    ids=str,
)
def test_an_edited_record_is_refused(
    folder: PlanFolder, plan: Plan, change: dict[str, object]
) -> None:
    path = plan.path.with_suffix(".json")
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, **change}))
    _refused(folder, path, "delete")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (plan_record.MAX_RECORD_BYTES + 1)],
    ids=["empty", "cut", "list", "no text", "deep", "large"],
)
def test_a_record_that_is_none_is_refused(folder: PlanFolder, plan: Plan, raw: bytes) -> None:
    path = plan.path.with_suffix(".json")
    path.write_bytes(raw)
    _refused(folder, path, "delete")


def test_the_record_of_another_plan_is_refused(folder: PlanFolder, plan: Plan) -> None:
    other = msgspec.structs.replace(KEY, model="cd" * 32)
    moved = folder.store(new_record(other, "digits", 2, 1.0), CONTENT)
    moved.path.with_suffix(".json").replace(plan.path.with_suffix(".json"))
    _refused(folder, plan.path.with_suffix(".json"), "it is of another plan")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(folder: PlanFolder, mode: int) -> None:
    folder.path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"{folder.path} has mode {mode:o}; .* set INFERQ_PLANS"):
        folder.open()
    folder.path.chmod(0o755)
    folder.open()


def test_a_file_that_others_may_write_is_refused(folder: PlanFolder, plan: Plan) -> None:
    plan.path.chmod(0o666)
    _refused(folder, plan.path, "has mode 666")


def test_links_and_pipes_are_not_followed(folder: PlanFolder, plan: Plan, tmp_path: Path) -> None:
    plan.path.rename(tmp_path / "elsewhere")
    plan.path.symlink_to(tmp_path / "elsewhere")
    _refused(folder, plan.path, "cannot be read")
    plan.path.unlink()
    os.mkfifo(plan.path, 0o600)
    _refused(folder, plan.path, "is no file")


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = PlanFolder(tmp_path / "a" / "plans")
    folder.open()
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"INFERQ_PLANS is .*; expected a folder for plans"):
        PlanFolder(tmp_path / "file" / "plans").open()


def test_where_plans_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "inferq" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "inferq" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "inferq" / "plans"
    monkeypatch.setenv("INFERQ_PLANS", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.setenv("INFERQ_PLANS", "~/mine")
    assert default_folder() == Path.home() / "mine"
    monkeypatch.setenv("INFERQ_PLANS", "mine")
    with pytest.raises(ConfigError, match="INFERQ_PLANS is 'mine'; expected an absolute path"):
        default_folder()


def test_a_verified_plan_stays_verified(folder: PlanFolder, plan: Plan) -> None:
    verified = folder.verified(plan, 0.002)
    found = folder.find("digits", 2, KEY)
    assert found is not None
    assert found.record == verified.record
    assert (found.record.verified, found.record.max_error) == (True, 0.002)


def test_a_newer_plan_replaces_the_older_one_and_nothing_is_left_over(
    folder: PlanFolder, plan: Plan
) -> None:
    folder.store(new_record(KEY, "digits", 2, 2.5), CONTENT * 2)
    found = folder.find("digits", 2, KEY)
    assert found is not None
    assert found.load() == CONTENT * 2
    assert sorted(path.suffix for path in folder.path.iterdir()) == [".json", ".plan"]


def test_a_write_that_breaks_off_leaves_no_plan_behind(
    folder: PlanFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inferq.workers.process.trusted_files.os.fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        folder.store(new_record(KEY, "digits", 2, 2.5), CONTENT * 2)
    monkeypatch.undo()
    assert folder.find("digits", 2, KEY) is None
    assert [path.suffix for path in folder.path.iterdir()] == [".plan"]


def test_what_killed_processes_left_is_swept_up(folder: PlanFolder, plan: Plan) -> None:
    """Of this plan at once: who has the lock is the only one who writes. Of others after a day."""
    mine, old, new, other = (
        folder.path / f".{name}"
        for name in (
            f"{plan.path.name}.0123abcd",
            "a.1.fp32.ab.plan.0123abcd",
            "timing.x.cache.0123abcd",
            "else.of.somebody",
        )
    )
    for path in (mine, old, new, other):
        path.write_bytes(CONTENT)
    day_ago = time.time() - 86_400
    for path in (old, other):
        os.utime(path, (day_ago - 60, day_ago - 60))
    os.utime(new, (day_ago + 3600, day_ago + 3600))
    with folder.lock("digits", 2, KEY):
        assert sorted(folder.path.glob(".*")) == sorted([new, other])
    assert folder.find("digits", 2, KEY) is not None


def test_a_read_only_folder_still_gives_its_plans(
    folder: PlanFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: str, flags: int, *mode: int, **more: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *mode, **more)

    monkeypatch.setattr("inferq.workers.trt.plan_lock.os.open", read_only)
    with folder.lock("digits", 2, KEY) as writable:
        assert not writable
        assert folder.find("digits", 2, KEY) is not None
    verified = folder.verified(plan, 0.0)
    assert verified.record.verified, "it serves, though the next worker verifies it again"
    assert folder.find("digits", 2, KEY) == Plan(plan.path, plan.record, from_cache=True)


def test_a_plan_that_was_built_anew_while_it_was_verified_is_not_spoilt(
    folder: PlanFolder, plan: Plan
) -> None:
    newer = folder.store(new_record(KEY, "digits", 2, 2.5), CONTENT * 2)
    assert folder.verified(plan, 0.0).record.verified
    found = folder.find("digits", 2, KEY)
    assert found is not None
    assert found.record == newer.record
    assert not found.record.verified


def test_two_processes_of_the_same_number_write_two_files(
    folder: PlanFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers that share a folder."""
    names: list[str] = []
    real = os.fsync

    def noted(file: int) -> None:
        names.extend(path.name for path in folder.path.glob(".*"))
        real(file)

    monkeypatch.setattr("inferq.workers.process.trusted_files.os.fsync", noted)
    for _ in range(2):
        folder.write_cache("timing", CONTENT)
    assert len(set(names)) == 2


def test_an_empty_plan_is_not_stored(folder: PlanFolder) -> None:
    with pytest.raises(ConfigError, match="the plan has 0 bytes"):
        folder.store(new_record(KEY, "digits", 2, 1.0), b"")


def test_caches_are_kept_and_damaged_ones_dropped(
    folder: PlanFolder, caplog: pytest.LogCaptureFixture
) -> None:
    assert folder.read_cache("timing") is None
    folder.write_cache("timing", CONTENT)
    assert folder.read_cache("timing") == CONTENT
    (folder.path / "timing.cache").write_bytes(b"x" * 100)
    assert folder.read_cache("timing") is None
    assert "is not what was stored there" in caplog.text


def test_the_models_digest_counts_its_external_data(tmp_path: Path) -> None:
    path = onnx_models.external(tmp_path / "model.onnx", "w.bin")
    weights = tmp_path / "w.bin"
    with pytest.raises(ConfigError, match=r"w\.bin cannot be read"):
        model_digest(path)
    weights.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    first = model_digest(path)
    assert model_digest(path) == first
    weights.write_bytes(np.ones(4, np.float32).tobytes())
    assert model_digest(path) != first


def test_external_data_outside_the_models_folder_is_refused(tmp_path: Path) -> None:
    path = onnx_models.external(tmp_path / "1" / "model.onnx", "../w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(16))
    with pytest.raises(ConfigError, match=r"keeps data in '\.\./w\.bin'; expected a file in its"):
        model_digest(path)
