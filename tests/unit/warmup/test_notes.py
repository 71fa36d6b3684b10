"""What a process tried when it was killed is known to the next one, and believed within reason."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from inferq.workers.warmup import limits, notes
from inferq.workers.warmup.cache import KEPT_S, MAX_FILES, Cache, Killed, Record, key_of
from inferq.workers.warmup.notes import Note, Notes, Size, absolve

STEM = "m.1.0123456789abcdef"
ALLOWED = 700 << 20

#: Tries 8 rows, having survived 4, and is killed by itself meanwhile.
DIES = """
import os, signal, sys
from pathlib import Path
from inferq.workers.warmup.cache import Cache
from inferq.workers.warmup.notes import Notes, Size
notes = Notes(Cache(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]))
notes.open()
if sys.argv[4] == "serving":
    notes.serve()
with notes.trying(Size(12, 4)):
    pass
if sys.argv[4] == "stopping":
    notes.close()
if sys.argv[4] == "serving":
    os.kill(os.getpid(), signal.SIGKILL)
with notes.trying(Size(24, 8)):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What this process takes for `limits.oom_kills`."""
    told = limits.oom_kills()
    monkeypatch.setattr(limits, "oom_kills", lambda: told)
    return told


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``later(60)``: it is a minute later."""
    now = time.time

    def shift(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)

    return shift


def _die(folder: Path, state: str = "loading") -> int:
    command = [sys.executable, "-c", DIES, str(folder), STEM, str(ALLOWED), state]
    process = subprocess.Popen(command)
    assert process.wait(30) == -9
    return process.pid


def _open(folder: Path, allowed: int = ALLOWED) -> Killed | None:
    cache = Cache(folder)
    cache.open()
    mine = Notes(cache, STEM, allowed)
    try:
        return mine.open()
    finally:
        mine.close()


def test_a_size_at_which_a_process_was_killed_is_not_tried_by_the_next(folder: Path) -> None:
    _die(folder)
    killed = _open(folder)
    assert killed is not None
    assert (killed.elements, killed.rows) == (24, 8)
    assert not list(folder.glob("*.trying"))


def test_an_end_that_nothing_explains_is_held_against_a_size_once(folder: Path) -> None:
    """Whoever kills a worker that loads costs one start, not all to come."""
    _die(folder)
    first = _open(folder)
    assert first is not None
    assert not first.sure
    assert _open(folder) is None


def test_and_not_after_a_while(folder: Path, later: Callable[[float], None]) -> None:
    _die(folder)
    later(notes.UNSURE_S + 60)
    assert _open(folder) is None


def test_two_such_ends_at_one_size_are_no_chance(folder: Path) -> None:
    _die(folder)
    _open(folder)
    _die(folder)
    for _ in range(3):
        killed = _open(folder)
        assert killed is not None
        assert killed.sure


@pytest.mark.parametrize("where", ["machine", "/x"])
def test_if_the_kernel_killed_for_want_of_memory_it_is_not_tried_any_more(
    folder: Path, kills: dict[str, int], where: str, later: Callable[[float], None]
) -> None:
    _die(folder)
    (path,) = folder.glob("*.trying")
    note = msgspec.json.decode(path.read_bytes(), type=Note)
    note.oom_kills[where] = 5
    path.write_bytes(msgspec.json.encode(note))
    kills[where] = 6
    for _ in range(3):
        killed = _open(folder)
        assert killed is not None
        assert killed.sure
    assert _open(folder, 2 * ALLOWED) is None, "there is more memory now"
    assert _open(folder) is not None


def test_what_a_serving_process_had_survived_is_too_much_if_the_kernel_killed_it(
    folder: Path, kills: dict[str, int]
) -> None:
    _die(folder, "serving")
    assert _open(folder) is None, "nothing says so"
    _die(folder, "serving")
    (path,) = folder.glob("*.trying")
    note = msgspec.json.decode(path.read_bytes(), type=Note)
    note.oom_kills["/x"] = 5
    path.write_bytes(msgspec.json.encode(note))
    kills["/x"] = 6
    killed = _open(folder)
    assert killed is not None
    assert killed.rows == 4


def test_a_process_that_was_told_to_end_blames_nothing(folder: Path) -> None:
    _die(folder, "stopping")
    assert _open(folder) is None


def test_a_process_that_ended_for_another_reason_blames_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    place = folder / "inferq" / "warm-up"
    place.mkdir(parents=True, mode=0o700)
    absolve(_die(place) + 1)
    assert list(place.glob("*.trying")), "that was another one"
    absolve(_die(place))
    assert not list(place.glob("*.trying"))


def test_a_live_process_is_not_taken_for_a_dead_one(folder: Path) -> None:
    cache = Cache(folder)
    alive = Notes(cache, STEM, ALLOWED)
    alive.open()
    with alive.trying(Size(24, 8)):
        assert _open(folder) is None
        assert len(list(folder.glob("*.trying"))) == 1
    assert alive.survived == 24
    alive.close()
    alive.close()
    assert not list(folder.glob("*.trying"))


def test_the_largest_of_several_is_noted(folder: Path) -> None:
    mine = Notes(Cache(folder), STEM, ALLOWED)
    mine.open()
    (path,) = folder.glob("*.trying")

    def tried() -> Size | None:
        return msgspec.json.decode(path.read_bytes(), type=Note).trying

    with mine.trying(Size(3, 1)), mine.trying(Size(9, 3)), mine.trying(Size(6, 2)):
        assert tried() == Size(9, 3)
    assert tried() is None
    mine.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"format": 2}',
        b'{"seconds": {"0": 1.0}}',
        b'{"seconds": {"1": -1.0}}',
        b'{"killed": [{}]}',
        b"\x80\x04.",
        b"0" * 70_000,
    ],
)
def test_a_damaged_file_is_ignored_and_said(
    folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / f"{STEM}.json").write_bytes(content)
    assert Cache(folder).read(STEM) == Record()
    assert [f"{STEM}.json is ignored" in line for line in caplog.messages] == [True]
    (folder / f"{STEM}.00.trying").write_bytes(content)
    assert _open(folder) is None


def test_foreign_files_and_links_are_ignored(folder: Path) -> None:
    (folder / "elsewhere").write_bytes(msgspec.json.encode(Record(seconds={1: 1.0})))
    (folder / f"{STEM}.json").symlink_to(folder / "elsewhere")
    assert Cache(folder).read(STEM) == Record()


def test_a_folder_that_others_may_write_is_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder.chmod(0o777)
    cache = Cache(folder)
    cache.open()
    assert cache.folder is None
    assert "what warm-up measures is not kept" in caplog.text
    cache.write(STEM, Record())
    assert cache.read(STEM) == Record()
    mine = Notes(cache, STEM, ALLOWED)
    assert mine.open() is None
    with mine.trying(Size(24, 8)):
        pass
    mine.close()
    assert not list(folder.iterdir())


def test_what_is_kept_is_the_users_alone_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = Cache()
    cache.open()
    assert cache.folder == tmp_path / "cache" / "inferq" / "warm-up"
    cache.write(STEM, Record(seconds={1: 0.5, 32: 2.0}))
    assert cache.read(STEM).seconds == {1: 0.5, 32: 2.0}
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    (path,) = cache.folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_old_files_and_the_oldest_of_too_many_go(folder: Path) -> None:
    for number in range(MAX_FILES + 3):
        path = folder / f"{number}.json"
        path.write_bytes(b"")
        os.utime(path, (time.time() - MAX_FILES + number,) * 2)
    old = folder / "old.json"
    old.write_bytes(b"")
    os.utime(old, (time.time() - KEPT_S - 60,) * 2)
    Cache(folder).open()
    names = {path.name for path in folder.iterdir()}
    assert "old.json" not in names
    assert "0.json" not in names
    assert f"{MAX_FILES + 2}.json" in names
    assert len(names) <= MAX_FILES


def test_whatever_run_times_depend_on_makes_another_key() -> None:
    keys = {key_of({"model": model, "lanes": lanes}) for model in "ab" for lanes in (1, 2)}
    assert len(keys) == 4
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
