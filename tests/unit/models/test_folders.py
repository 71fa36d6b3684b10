"""Which folders and versions of a repository are models, and which links lead out of it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from helpers import onnx_models
from helpers.bad_models import BAD, FOUND_LATE, NEWEST, OTHERS, write_others
from helpers.refusals import onnx_model, refusal_of

from inferq.workers.models.folders import Folders, look_through
from inferq.workers.models.not_served import NotServed
from inferq.workers.models.repository import load_model, load_models, model_names


def test_a_model_of_which_no_version_is_whole_is_refused_with_all_reasons(tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / "m" / str(version)).mkdir(parents=True)
    assert refusal_of(tmp_path) == "; ".join(
        f"no model in {tmp_path}/m/{version}; expected model.onnx, model.pt2 or model.py there"
        for version in (2, 1)
    )


@pytest.mark.parametrize("name", NEWEST)
def test_the_newest_version_that_is_whole_is_served(tmp_path: Path, name: str) -> None:
    path = onnx_model(tmp_path)
    NEWEST[name].write(tmp_path, "m")
    (tmp_path / "m" / "3").mkdir()
    spec = load_model(tmp_path, "m")
    assert (spec.version, spec.versions, spec.path) == (1, (1, 2, 3), path)
    assert [(each.model, each.version) for each in spec.passed_over] == [("m", 3), ("m", 2)]
    assert "no model in " in spec.passed_over[0].reason
    assert NEWEST[name].reason in spec.passed_over[1].reason


def test_a_version_of_another_engines_file_is_passed_over(tmp_path: Path) -> None:
    onnx_model(tmp_path, toml="engine = 'onnxruntime'")
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "2" / "model.pt2").write_bytes(b"PK")
    spec = load_model(tmp_path, "m")
    assert spec.version == 1
    assert spec.passed_over[0].reason == f"no model in {tmp_path}/m/2; expected model.onnx there"


def test_a_whole_version_that_the_engine_refuses_is_not_replaced_by_an_older_one(
    tmp_path: Path,
) -> None:
    onnx_model(tmp_path)
    BAD["operator"].write(tmp_path, "other")
    shutil.move(tmp_path / "other" / "1", tmp_path / "m" / "2")
    assert "m/2/model.onnx cannot be loaded by ONNX Runtime" in refusal_of(tmp_path)


def test_a_newest_version_that_leads_out_of_the_repository_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "models"
    onnx_model(root)
    outside = onnx_models.double(tmp_path / "outside" / "model.onnx")
    (root / "m" / "2").mkdir()
    (root / "m" / "2" / "model.onnx").symlink_to(outside)
    assert f"leads to {outside}" in refusal_of(root)


@pytest.mark.parametrize("name", sorted(set(BAD) - FOUND_LATE))
def test_each_kind_of_bad_model_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    BAD[name].write(tmp_path, name)
    assert BAD[name].reason in refusal_of(tmp_path, name)
    assert model_names(tmp_path) == [name]


def test_folders_that_hold_no_model_are_passed_over(tmp_path: Path) -> None:
    onnx_model(tmp_path, "good")
    write_others(tmp_path)
    assert look_through(tmp_path) == Folders(("good",), OTHERS, (".hidden", "README.md"))


def test_a_link_that_leads_out_or_nowhere_is_no_folder_that_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    (tmp_path / "docs").mkdir()
    (root / "out").symlink_to(tmp_path / "docs")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").symlink_to(__file__)
    assert look_through(root) == Folders(("loop", "nowhere", "out"), (), ("file",))
    _, bad = load_models(root, model_names(root))
    assert [each.model for each in bad] == ["loop", "nowhere", "out"]


def test_a_folder_that_may_not_be_read_is_a_model_if_it_is_called_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "lost+found"):
        (tmp_path / name).mkdir()
    iterdir = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert look_through(tmp_path) == Folders(("closed",), ("lost+found",), ())


def test_a_name_in_any_bytes_can_be_told_and_published(tmp_path: Path) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/\xff\x1b[2J\n/1")
    (name,) = model_names(tmp_path)
    _, (bad,) = load_models(tmp_path, [name])
    assert bad.model == r"\udcff\x1b[2J\n"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(bad), type=NotServed) == bad
    assert str(bad).isprintable()


@pytest.mark.parametrize("name", ["..", "", "a/b", ".hidden", "-m", "x" * 101, "ä"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    assert f"model name is {name!r}; expected letters" in refusal_of(tmp_path, name)


def test_an_unknown_model_or_repository_is_refused(tmp_path: Path) -> None:
    assert "model 'm': no folder" in refusal_of(tmp_path)
    assert "model repository is" in refusal_of(tmp_path / "none")


@pytest.mark.parametrize("linked", ["m", "m/1", "m/1/model.onnx", "m/model.toml"])
def test_a_link_out_of_the_repository_is_refused(tmp_path: Path, linked: str) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside"
    root.mkdir()
    onnx_model(root, toml="")
    shutil.move(root / linked, outside)
    (root / linked).symlink_to(outside)
    assert f"leads to {outside}" in refusal_of(root)
    assert "expected a place in the repository" in refusal_of(root)


def test_a_link_within_the_repository_is_followed(tmp_path: Path) -> None:
    onnx_model(tmp_path, "stored")
    (tmp_path / "m").symlink_to(tmp_path / "stored")
    assert load_model(tmp_path, "m").batchable


def test_a_link_to_labels_outside_the_models_folder_is_refused(tmp_path: Path) -> None:
    onnx_model(tmp_path, toml="labels = 'names.txt'")
    (tmp_path / "names.txt").write_text("cat\n")
    (tmp_path / "m" / "names.txt").symlink_to(tmp_path / "names.txt")
    assert "expected a file in the model's folder" in refusal_of(tmp_path)


def test_a_file_that_anyone_may_write_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = onnx_model(tmp_path)
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path, "m")
    assert f"{path} may be written by any user" in caplog.text
