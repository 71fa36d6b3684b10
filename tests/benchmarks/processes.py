"""Stock Celery workers as processes: as lean as their own options make them, never left behind."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from inferq.workers.process.children import end_child, start_child

STOP_TIMEOUT_S = 20.0
#: What every measured worker leaves out, inferq's as well: logging and talking to its neighbours.
LEAN = ("--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat")


@contextmanager
def stock_worker(module: str, queue: str, pool: str, env: Mapping[str, str]) -> Iterator[int]:
    """A worker of the app in `module` on `queue`; its process id. Its log is shown if it fails."""
    command = [
        sys.executable, "-m", "celery", "-A", module, "worker", "-P", pool, "-Q", queue,
        "-n", f"{queue}@%h", *LEAN,
    ]  # fmt: skip
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with tempfile.TemporaryFile(prefix=f"{queue}-") as log:
        process = start_child(command, log, env={**os.environ, "PYTHONPATH": path, **env})
        try:
            yield process.pid
            if process.poll() is not None:
                raise RuntimeError(f"worker of {queue} ended with status {process.returncode}")
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            end_child(process, STOP_TIMEOUT_S)
