"""Worker processes of the baselines: started, waited for, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
# `python -m celery`, which the kernel kills (PR_SET_PDEATHSIG, SIGKILL) if the benchmark dies.
CELERY = "import ctypes; ctypes.CDLL(None).prctl(1, 9); from celery.__main__ import main; main()"


@contextmanager
def celery_worker(
    module: str, queue: str, *, pool: str = "solo", env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A stock Celery worker on `queue`, as lean as its own options make it."""
    command = [
        sys.executable, "-c", CELERY, "-A", module, "worker", "-P", pool, "-Q", queue,
        "-n", f"{queue}@%h", "--loglevel", "ERROR",
        "--without-gossip", "--without-mingle", "--without-heartbeat",
    ]  # fmt: skip
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with tempfile.TemporaryFile(prefix=f"{queue}-") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
            if process.poll() is not None:
                raise RuntimeError(f"worker of {queue} ended with {process.returncode}")
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after a while SIGKILL."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
