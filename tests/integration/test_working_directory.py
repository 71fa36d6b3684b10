"""What happens to stand in the working directory is neither run nor read by inferq's commands."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers.repository import fake_model
from helpers.wait import until
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.process.children import end_child, start_child
from inferq.workers.process.embedded import free_port

#: Modules that a process of ours imports, or that Celery, Flower or Python look for by themselves.
NAMES = (
    "celery", "celeryconfig", "click", "django", "flower", "flowerconfig", "inferq", "kombu",
    "msgspec", "numpy", "prometheus_client", "redis", "sitecustomize", "tornado", "usercustomize",
)  # fmt: skip
TIMEOUT_S = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module of each of NAMES, which leaves a trace if it is run."""
    folder = tmp_path / "cloned"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"import pathlib\npathlib.Path(__file__).with_name('{name}.was-run').touch()\n"
        )
    return folder


@pytest.fixture
def environment(redis_url: str, tmp_path: Path) -> dict[str, str]:
    fake_model(tmp_path / "models", "m", knobs="lanes = 1\nwarm_up = false")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "INFERQ_REDIS_URL": redis_url,
        "INFERQ_MODELS": str(tmp_path / "models"),
        "TMPDIR": str(tmp_path),
        # A Django project's shell: Celery would put the working directory on the path for it.
        "DJANGO_SETTINGS_MODULE": "settings",
    }


def command(*args: str) -> list[str]:
    """As the script `inferq` runs it: Python itself looks in the script's folder, not in ours."""
    return [sys.executable, "-P", "-m", "inferq.workers.cli", *args]


def traces(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.was-run"))


@contextmanager
def running(folder: Path, environment: Mapping[str, str], *args: str) -> Iterator[Path]:
    """The command in the working directory `folder`; gives its log."""
    with tempfile.NamedTemporaryFile() as log:
        # Not by `start_child`, which is what is tried here.
        process = subprocess.Popen(
            command(*args),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
        )
        try:
            yield Path(log.name)
        except BaseException:
            sys.stderr.write(Path(log.name).read_text(errors="replace")[-4000:])
            raise
        finally:
            end_child(process, TIMEOUT_S)


def test_inferq_worker_and_those_who_use_it_run_nothing_that_stands_in_the_working_directory(
    redis: Redis, folder: Path, environment: dict[str, str]
) -> None:
    def run(*args: str) -> None:
        done = subprocess.run(
            command(*args),
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()

    with running(folder, environment, "worker", "--cpu"):
        until(lambda: redis.zcard(Names().serving("m")), TIMEOUT_S, "it serves")
        run("health")
        run("models", environment["INFERQ_MODELS"])
        run("queues")
        run("bench", "m", "--concurrency", "1", "--window", "0.2", "--max-windows", "3")
    assert traces(folder) == []
    assert sorted(path.stem for path in folder.iterdir()) == list(NAMES)


def test_inferq_flower_runs_nothing_that_stands_in_the_working_directory(
    folder: Path, environment: dict[str, str]
) -> None:
    port = free_port()

    def answers() -> bool:
        url = f"http://127.0.0.1:{port}/workers"
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as reply:
            return bool(reply.status == 200)
        return False

    with running(folder, environment, "flower", "--port", str(port)):
        until(answers, TIMEOUT_S, "Flower answers")
    assert traces(folder) == []
    assert sorted(path.stem for path in folder.iterdir()) == list(NAMES)


def test_a_child_and_its_children_import_nothing_from_the_working_directory(folder: Path) -> None:
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'celeryconfig'])"
    with tempfile.TemporaryFile() as log:
        for call in (["-c", "import flowerconfig"], ["-m", "redis"], ["-c", grandchild]):
            child = start_child([sys.executable, *call], log, cwd=folder)
            child.wait(TIMEOUT_S)
    assert traces(folder) == []
