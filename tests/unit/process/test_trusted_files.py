"""Plans are taken from where only we and root can put them, whoever of both did."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inferq.shared.errors import ConfigError
from inferq.workers.models.ranges import InputRange
from inferq.workers.process import trusted_files
from inferq.workers.trt.plan_record import PlanKey, new_record
from inferq.workers.trt.plans import PlanFolder

SOMEBODY, NOBODY = 4242, 65534
INSTEAD = "set INFERQ_PLANS to another folder"
KEY = PlanKey(
    "ab" * 32, "tensorrt-rtx", "1.7", "any", "any", "fp32", ((InputRange("x", (1,), (4,), (8,)),),)
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not; root's, where root tests."""
    path = Path(tempfile.mkdtemp(prefix="inferq-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextmanager
def _as(user: int) -> Iterator[None]:
    before = os.geteuid()
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(before)


def _refused(path: Path, match: str) -> str:
    with pytest.raises(ConfigError, match=match) as caught:
        trusted_files.trusted_folder(path, INSTEAD)
    assert caught.value.message.endswith(INSTEAD)
    assert "chmod" not in caught.value.message
    return caught.value.message


def test_our_folder_below_a_sticky_one_is_trusted(public: Path) -> None:
    """As /tmp is."""
    (public / "shared" / "plans").mkdir(parents=True, mode=0o700)
    (public / "shared").chmod(0o1777)
    path = public / "shared" / "plans"
    assert trusted_files.trusted_folder(path, INSTEAD) == path.resolve()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_above_that_others_may_write_is_refused(public: Path, mode: int) -> None:
    (public / "shared" / "a" / "plans").mkdir(parents=True, mode=0o700)
    (public / "shared").chmod(mode)
    said = _refused(public / "shared" / "a" / "plans", rf"/shared has mode {mode:o}; expected what")
    assert f"expected what is above {public}/shared/a/plans to be writable by you or root" in said


def test_a_sticky_folder_itself_holds_no_plans(public: Path) -> None:
    """INFERQ_PLANS=/tmp: everybody could put a plan there."""
    public.chmod(0o1777)
    _refused(public, rf"{public} has mode 1777; expected it to be writable by you or root alone")


@needs_root
@pytest.mark.parametrize("whose", ["shared", "shared/plans"])
def test_what_somebody_else_owns_is_refused_also_below_a_sticky_folder(
    public: Path, whose: str
) -> None:
    (public / "shared" / "plans").mkdir(parents=True, mode=0o700)
    (public / "shared").chmod(0o1777)
    os.chown(public / whose, SOMEBODY, SOMEBODY)
    _refused(public / "shared" / "plans", rf"/{whose} belongs to user {SOMEBODY}; expected")


def test_links_are_followed_once(public: Path) -> None:
    """What a link leads to is checked, and is what is used, wherever the link leads later."""
    (public / "plans").mkdir(mode=0o700)
    (public / "shared").mkdir()
    (public / "shared").chmod(0o777)
    (public / "shared" / "link").symlink_to(public / "plans")
    folder = PlanFolder(public / "shared" / "link")
    folder.open()
    assert folder.path == (public / "plans").resolve()
    (public / "back").symlink_to(public / "shared")
    _refused(public / "back", "/shared has mode 777")


def test_what_is_made_can_be_written_by_nobody_else(public: Path) -> None:
    before = os.umask(0)
    try:
        trusted_files.make_folder(public / "a" / "b" / "plans")
    finally:
        os.umask(before)
    modes = [(public / each).stat().st_mode & 0o777 for each in ("a", "a/b", "a/b/plans")]
    assert modes == [0o755, 0o755, 0o700]


@pytest.mark.parametrize(("of_folder", "of_file"), [(0o700, 0o600), (0o755, 0o644), (0o750, 0o640)])
def test_a_file_may_be_read_by_those_who_may_read_its_folder(
    public: Path, of_folder: int, of_file: int
) -> None:
    public.chmod(of_folder)
    before = os.umask(0o022)
    try:
        trusted_files.write(public / "file", b"content")
    finally:
        os.umask(before)
    assert (public / "file").stat().st_mode & 0o777 == of_file


@needs_root
def test_a_folder_that_root_filled_serves_another_user_who_cannot_write_it(public: Path) -> None:
    """As in a container image: built by root, run by nobody."""
    (public / "plans").mkdir(mode=0o755)
    (public / "plans").chmod(0o755)
    roots = PlanFolder(public / "plans")
    roots.open()
    with roots.lock("digits", 2, KEY):
        plan = roots.store(new_record(KEY, "digits", 2, 1.5), b"a plan")
    with _as(NOBODY):
        folder = PlanFolder(public / "plans")
        folder.open()
        with folder.lock("digits", 2, KEY) as writable:
            assert not writable
            found = folder.find("digits", 2, KEY)
        assert found is not None
        assert found.load() == b"a plan"
        assert folder.verified(found, 0.0).record.verified
    os.chown(plan.path, SOMEBODY, SOMEBODY)
    with _as(NOBODY), pytest.raises(ConfigError, match=rf"belongs to user {SOMEBODY}; .*delete it"):
        folder.find("digits", 2, KEY)
    plan.path.unlink()
    with _as(NOBODY):
        assert folder.find("digits", 2, KEY) is None


@needs_root
def test_root_takes_no_plan_of_another_user(public: Path) -> None:
    os.chown(public, NOBODY, NOBODY)
    _refused(public, f"belongs to user {NOBODY}")
    with _as(NOBODY):
        assert trusted_files.trusted_folder(public, INSTEAD) == public.resolve()
