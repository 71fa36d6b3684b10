"""The example of a backend service, where it gets no answers (test_containers: where it does)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.repository import fake_model
from helpers.worker import Worker

from inferq.producer.examples.file_types import MODEL


def ask(redis_url: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    labels = folder / "model.toml"
    labels.write_text('labels = ["python"]\n')
    command = [sys.executable, "-m", "inferq.producer.examples.file_types"]
    return subprocess.run(
        [*command, "--labels", labels, *args, folder],
        env={**os.environ, "INFERQ_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_it_says_which_model_nobody_serves(redis_url: str, tmp_path: Path) -> None:
    done = ask(redis_url, tmp_path, "--wait", "0.5")
    assert done.returncode == 1
    assert f"model {MODEL!r}: no worker serves it" in done.stderr


def test_it_says_what_is_wrong_with_its_requests(redis_url: str, tmp_path: Path) -> None:
    fake_model(tmp_path / "models", MODEL, knobs="warm_up = false")
    with Worker(redis_url, tmp_path / "models"):
        done = ask(redis_url, tmp_path)
    assert done.returncode == 1
    assert "expected" in done.stderr
    assert "Traceback" not in done.stderr
