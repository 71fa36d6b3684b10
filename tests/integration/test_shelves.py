"""What Celery and Flower keep in files and unpickle is taken from nobody else's hands."""

from __future__ import annotations

import os
import shelve
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.flower import FlowerProcess
from helpers.repository import fake_model
from helpers.wait import until

from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import EmbeddedRedis

SOMEBODY = 4242
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
TIMEOUT_S = 60.0


class Harm:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._trace,)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder of ours that others may enter and nobody else may write."""
    with tempfile.TemporaryDirectory(prefix="inferq-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def planted(public: Path) -> Path:
    """The name of a shelf of ours that does harm when it is read, by Celery and by Flower."""
    path = public / "kept"
    with shelve.open(str(path)) as shelf:
        for key in ("events", "revoked", "clock", "zrevoked"):
            shelf[key] = Harm(public / "trace")
    for file in public.iterdir():
        file.chmod(0o600)
    return path


def _files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}*"))


def _written_by_all(path: Path) -> None:
    for file in _files(path):
        file.chmod(0o666)


def _given_away(path: Path) -> None:
    for file in _files(path):
        os.chown(file, SOMEBODY, SOMEBODY)


def _folder_open(path: Path) -> None:
    path.parent.chmod(0o777)


def _folder_sticky(path: Path) -> None:
    path.parent.chmod(0o1777)


def _linked(path: Path) -> None:
    for file in _files(path):
        file.rename(elsewhere := file.with_name(f"else{file.suffix}"))
        file.symlink_to(elsewhere)


WRONG = [
    pytest.param(_written_by_all, id="written by all"),
    pytest.param(_given_away, id="somebody else's", marks=needs_root),
    pytest.param(_folder_open, id="in an open folder"),
    pytest.param(_folder_sticky, id="in a sticky folder"),
    pytest.param(_linked, id="a link"),
]


def flower(server: EmbeddedRedis, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """``inferq flower`` in the working directory `folder`, which is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "inferq.workers.cli", "flower", "--port=0", *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
             "INFERQ_REDIS_URL": server.url},
        cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def test_the_shelf_that_is_planted_does_harm(planted: Path) -> None:
    with shelve.open(str(planted)) as shelf:
        assert shelf["events"] is None
    assert (planted.parent / "trace").exists()


@pytest.mark.parametrize("spoil", WRONG)
def test_flower_does_not_read_tasks_that_others_may_have_written(
    server: EmbeddedRedis, planted: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(planted)
    ended = flower(server, planted.parent, "--persistent=true", f"--db={planted}")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"inferq: {planted.parent}")
    assert "expected" in line
    assert "since it is unpickled" in line
    assert "--db" in line
    assert not (planted.parent / "trace").exists()


@pytest.mark.parametrize("spoil", WRONG)
def test_a_worker_does_not_read_a_statedb_that_others_may_have_written(
    server: EmbeddedRedis, planted: Path, spoil: Callable[[Path], None]
) -> None:
    fake_model(planted.parent / "models", "m", knobs="warm_up = false")
    spoil(planted)
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "inferq.workers.cli",
            "worker",
            "--cpu",
            "--models",
            str(planted.parent / "models"),
            "--statedb",
            str(planted),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "INFERQ_REDIS_URL": server.url,
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("inferq: ")]
    assert line.startswith(f"inferq: {planted.parent}")
    assert "since it is unpickled" in line
    assert "Traceback" not in ended.stderr
    assert not (planted.parent / "trace").exists()


def test_flower_keeps_its_tasks_away_from_the_working_directory(
    server: EmbeddedRedis, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may have been cloned or unpacked there: ours by its owner, and somebody else's work."""
    for file in _files(planted):
        file.rename(file.with_name(f"flower{file.suffix}"))
    before = sorted(planted.parent.iterdir())
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "inferq" / "flower"
    command = [
        sys.executable, "-m", "inferq.workers.cli", "flower", "--port=0", "--persistent=true",
        "--state-save-interval=50",
    ]  # fmt: skip
    monkeypatch.setenv("INFERQ_REDIS_URL", server.url)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    for _ in range(2):
        with (tmp_path / "log").open("wb") as log:
            mask = os.umask(0o002)  # as many distributions have it
            try:
                process = start_child(command, log, cwd=planted.parent)
            finally:
                os.umask(mask)
        try:
            until(lambda: "Visit me at" in (tmp_path / "log").read_text(), TIMEOUT_S, "it is up")
            until(lambda: list(kept.glob("tasks*")), what="it keeps its tasks")
        finally:
            end_child(process, TIMEOUT_S)
        assert "Failed to load" not in (tmp_path / "log").read_text()
    assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}
    assert kept.stat().st_mode & 0o777 == 0o700
    assert sorted(planted.parent.iterdir()) == before


def test_flower_reads_tasks_that_it_has_kept(server: EmbeddedRedis, public: Path) -> None:
    args = ["--persistent=true", f"--db={public / 'own'}"]
    with FlowerProcess(server.url, args=args):
        pass
    assert _files(public / "own")
    with FlowerProcess(server.url, args=args) as again:
        assert again.get("/tasks").status == 200
        assert "Failed to load" not in again.log
    with shelve.open(str(public / "own")) as shelf:
        assert "events" in shelf
