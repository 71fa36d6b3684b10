"""Workers tell how they are where no other user can tell it for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from inferq.shared.errors import ConfigError
from inferq.workers.supervision import runtime_folder
from inferq.workers.supervision.health import SERVING, Beat, forget_the_dead, read_beat

SOMEBODY = 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
Alter = Callable[[Path], object]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """XDG_RUNTIME_DIR."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def beat(pid: int) -> Beat:
    return Beat(pid, "node", SERVING, 0.0, 0.0, 0, 0, False, 0.0)


def test_xdg_runtime_dir_comes_first(own: Path, shared: Path) -> None:
    assert runtime_folder.default() == own / "inferq"
    assert runtime_folder.all_known() == [own / "inferq", shared / f"inferq-{os.geteuid()}"]


def test_without_xdg_runtime_dir_it_stands_among_temporary_files(shared: Path) -> None:
    assert runtime_folder.default() == shared / f"inferq-{os.geteuid()}"


@pytest.mark.parametrize(
    "alter",
    [
        lambda own: own.chmod(0o755),
        lambda own: own.chmod(0o770),
        lambda own: own.rmdir(),
        pytest.param(lambda own: os.chown(own, SOMEBODY, SOMEBODY), marks=needs_root),
    ],
    ids=["others may read", "a group may write", "not there", "somebody else's"],
)
def test_an_xdg_runtime_dir_that_is_not_ours_alone_is_not_used(
    own: Path, shared: Path, alter: Alter
) -> None:
    """As `su` leaves that of the user before."""
    alter(own)
    assert runtime_folder.default().parent == shared


def test_a_relative_xdg_runtime_dir_is_not_used(
    own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    monkeypatch.setenv("XDG_RUNTIME_DIR", own.name)
    assert runtime_folder.default().parent == shared


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_it_is_made_for_us_alone_whatever_the_umask(shared: Path, mask: int) -> None:
    with umask(mask):
        runtime_folder.make(runtime_folder.default())
        runtime_folder.make(runtime_folder.default())  # it may be there already
    found = runtime_folder.default().lstat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o700, os.geteuid())


def _linked(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.symlink_to(elsewhere)


def _made(mode: int, owner: int | None = None) -> Alter:
    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)
        if owner is not None:
            os.chown(path, owner, owner)

    return make


@pytest.mark.parametrize(
    ("alter", "what"),
    [
        (_linked, "is a link"),
        (Path.touch, "is no folder"),
        (_made(0o777), "has mode 777"),
        (_made(0o750), "has mode 750"),
        (_made(0o1777), "has mode 1777"),
        pytest.param(_made(0o700, SOMEBODY), f"belongs to user {SOMEBODY}", marks=needs_root),
    ],
    ids=["a link", "a file", "open", "a group's", "sticky", "somebody else's"],
)
def test_what_others_may_have_made_is_refused_with_one_line_that_says_what_to_do(
    shared: Path, alter: Alter, what: str
) -> None:
    folder = runtime_folder.default()
    alter(folder)
    with pytest.raises(ConfigError) as caught:
        runtime_folder.make(folder)
    assert caught.value.message.startswith(f"{folder} {what}; expected a folder of your own")
    assert "delete it" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_that_cannot_be_made_is_one_line(shared: Path) -> None:
    folder = shared / "gone" / "inferq"
    with pytest.raises(ConfigError, match=f"{folder} cannot be made: No such file"):
        runtime_folder.make(folder)


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, 1 << 70])
def test_a_number_that_no_process_has_is_no_heartbeats(tmp_path: Path, pid: int) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(beat(1)) | {"pid": pid}))
    assert read_beat(path) is None
    forget_the_dead(tmp_path)


def test_what_is_no_small_file_is_no_heartbeat_and_is_not_waited_for(tmp_path: Path) -> None:
    good = msgspec.json.encode(beat(1))
    (tmp_path / "good").write_bytes(good)
    assert (read_beat(tmp_path / "good") or beat(2)).pid == 1
    (tmp_path / "large").write_bytes(good + b" " * (8 << 20))
    (tmp_path / "deep").write_bytes(b'{"x":' + b"[" * 50_000)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("large", "deep", "folder", "pipe", "missing"):
        assert read_beat(tmp_path / name) is None, name


@needs_root
def test_a_heartbeat_that_somebody_else_wrote_is_none(tmp_path: Path) -> None:
    path = tmp_path / "beat.json"
    path.write_bytes(msgspec.json.encode(beat(1)))
    assert read_beat(path) is not None
    os.chown(path, SOMEBODY, SOMEBODY)
    assert read_beat(path) is None
    assert read_beat(path, anybodys=True) is not None, "as root may ask for by its name"
