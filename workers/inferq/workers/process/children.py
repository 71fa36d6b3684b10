"""Child processes that end when the process that started them ends, in whatever way.

They import what is installed or on PYTHONPATH, and never modules in the working directory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Final, NoReturn

# Runs in the child before the real command. A preexec_fn would do the same between fork and exec,
# where a lock that another thread of the parent held at the fork can hang it.
_TRAMPOLINE: Final = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent process is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def start_child(
    command: Sequence[str],
    output: IO[bytes] | int | None,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command`, with stdout and stderr to `output` (None: the caller's).

    It inherits the descriptors `pass_fds`, by their numbers.

    Its pid is the Popen's. On Linux the kernel sends it SIGKILL when the calling *thread* ends, so
    call this from a thread that lives as long as the child should. The child has a session of its
    own: Ctrl-C in the terminal does not reach it, and the parent decides.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env=safe_environment(os.environ if env is None else env),
        cwd=cwd,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def safe_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that must not import modules from the working directory.

    Python puts it first for a program that is started by ``-m`` or ``-c``.
    """
    return {**environment, "PYTHONSAFEPATH": "1"}


def end_child(process: subprocess.Popen[bytes], timeout: float) -> int:
    """SIGTERM, and SIGKILL after `timeout` seconds; returns the exit status. Idempotent."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def end_on_signals() -> None:
    """Make signals to end raise in this process' main thread, so that it ends its children.

    SIGINT raises KeyboardInterrupt, also in a background job, which a shell starts with SIGINT
    ignored; the others raise SystemExit.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, _exit)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
