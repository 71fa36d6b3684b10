"""`make show-answers`: right answers, audits, little memory and slow models, in build/answers.json.

`python -m shows.run [--out build]`. Exit status 0 only if each figure is what was promised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from shows.answers import wrong_answers
from shows.audit import REQUESTS, audit_cpu_ratio, audit_found_after
from shows.memory import capped_memory
from shows.slow_models import slow_model_rows

#: Seconds from the start of a worker with little memory until it serves.
READY_S: Final = 60.0
#: What audits may cost.
CPU_RATIO: Final = 1.01
ROWS: Final = 32


def main() -> None:
    """Everything, one after the other."""
    parser = argparse.ArgumentParser(prog="shows.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder to write into")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inferq-show-") as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # what workers measure here is of no use to others
        by_model = wrong_answers()
        figures: dict[str, Any] = {
            "wrong": sum(by_model.values()),
            "wrong_by_model": by_model,
            "audit_found_after": audit_found_after(),
            "audit_cpu_ratio": round(audit_cpu_ratio(), 4),
            "capped_memory": capped_memory(),
            "slow_model_rows": slow_model_rows(),
        }
    figures["took_s"] = round(time.monotonic() - began, 1)
    args.out.mkdir(exist_ok=True)
    (args.out / "answers.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    missed = _missed(figures)
    for each in missed:
        print(f"show-answers: {each}", file=sys.stderr)
    sys.exit(1 if missed else 0)


def _missed(figures: dict[str, Any]) -> list[str]:
    """What was promised and is not so."""
    memory, rows = figures["capped_memory"], figures["slow_model_rows"]
    kept = {
        "wrong is 0": figures["wrong"] == 0,
        f"audit_found_after is at most {REQUESTS}": figures["audit_found_after"] <= REQUESTS,
        f"audit_cpu_ratio is at most {CPU_RATIO}": figures["audit_cpu_ratio"] <= CPU_RATIO,
        "capped_memory.kills is 0": memory["kills"] == 0,
        f"capped_memory.ready_s is at most {READY_S:g}": memory["ready_s"] <= READY_S,
        f"slow_model_rows are {ROWS}": all(each == ROWS for each in rows.values()),
    }
    return [f"expected that {what}" for what, holds in kept.items() if not holds]


if __name__ == "__main__":
    main()
