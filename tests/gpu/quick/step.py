"""One step, in a process of its own: ``python -m gpu.quick.step NAME FILE``.

What it finds is in FILE at any time, so that a step that dies or runs out of time has told what it
knew. Exit status 0: it ended; `CANNOT_RUN`: FILE says why it cannot run here.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from gpu.quick.report import CANNOT_RUN, CannotRun, Report


def main(name: str, path: Path) -> int:
    """Run it; its exit status."""
    report = Report(path)
    try:
        importlib.import_module(f"gpu.quick.{name}").run(report)
    except CannotRun as reason:
        report.add(why_not=str(reason))
        return CANNOT_RUN
    except SystemExit as ending:
        print(ending.code, file=sys.stderr)
        return 1
    except Exception:  # noqa: BLE001 - it is told, and the process ends
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter: with a context that is beyond use its end may hang, or abort it.
    os._exit(status)
