"""Steady load, no faults: from the middle of the run on, nothing may grow.

`python -m soak.run [--minutes 30] [--rate 150]`. A real Redis, a worker of three models (one with
claim-checked requests) and a client in a process of its own; results live for `RESULT_EXPIRES_S`.
Each second everything is sampled: resident memory, threads and sockets of worker and client, Redis'
connections, keys and bytes. Exit status 0 only if no series has grown by more than `ALLOWED` from
the third quarter of the run to the last, and no request failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median

import numpy as np
import redis
from helpers.process import held_open
from helpers.repository import fake_model, numbered
from helpers.worker import Worker
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from inferq.producer import Client, Pending
from inferq.workers.process.embedded import EmbeddedRedis

RESULT_EXPIRES_S = 60
WIDE = 16_384
WIDTHS = {"m": 4, "slow": 4, "wide": WIDE}
#: What each series may be above its median of the quarter before: absolute, and a part of it.
ALLOWED = {
    "worker MB": (3.0, 0.0), "worker threads": (0.0, 0.0), "worker sockets": (0.0, 0.0),
    "client MB": (3.0, 0.0), "client threads": (0.0, 0.0), "client sockets": (0.0, 0.0),
    "Redis connections": (0.0, 0.0), "Redis keys": (0.0, 0.1), "Redis MB": (2.0, 0.1),
}  # fmt: skip
#: Requests that the client has unresolved at most.
_WINDOW = 256


@dataclass
class Series:
    """One figure, sampled each second."""

    values: list[float] = field(default_factory=list)

    def quarters(self) -> tuple[float, float]:
        """Medians of the third and of the last quarter."""
        quarter = len(self.values) // 4
        return median(self.values[2 * quarter : 3 * quarter]), median(self.values[3 * quarter :])

    def grew(self, allowed: tuple[float, float]) -> bool:
        before, after = self.quarters()
        return after > before + allowed[0] + allowed[1] * before


def load(url: str, rate: float, ending: Event, failures: multiprocessing.Queue[str]) -> None:
    """The client's process: `rate` requests a second, each answer compared."""
    with Client(url) as client:
        pending: list[tuple[Pending, float, int]] = []
        began, sent = time.monotonic(), 0
        while not ending.is_set():
            due = int((time.monotonic() - began) * rate)
            while sent < due:
                model = "wide" if sent % 10 == 0 else "slow" if sent % 10 == 1 else "m"
                n, width = float(sent % 1000), WIDTHS[model]
                each = client.submit(model, {"x": numbered(n, width)}, priority=sent % 4 * 3)
                pending.append((each, n, width))
                sent += 1
            while pending and (pending[0][0].done() or len(pending) > _WINDOW):
                _check(*pending.pop(0), failures)
            time.sleep(0.01)
        for left, n, width in pending:
            _check(left, n, width, failures)


def _check(pending: Pending, n: float, width: int, failures: multiprocessing.Queue[str]) -> None:
    try:
        np.testing.assert_array_equal(pending.result(30).outputs["x"], numbered(n, width))
    except Exception as problem:  # noqa: BLE001 - whatever it is, it is a failure
        failures.put(f"{pending.request_id}: {problem!r}"[:300])


def _process(name: str, pid: int) -> dict[str, float]:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    threads, sockets = held_open(pid)
    return {
        f"{name} MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        f"{name} threads": threads,
        f"{name} sockets": sockets,
    }


def sample(worker: int, client: int, store: redis.Redis) -> dict[str, float]:
    """One figure for each series."""
    return {
        **_process("worker", worker),
        **_process("client", client),
        "Redis connections": int(store.info("clients")["connected_clients"]),
        "Redis keys": int(store.dbsize()),
        "Redis MB": int(store.info("memory")["used_memory"]) / 1e6,
    }


def soak(
    seconds: float, rate: float, on_sample: Callable[[float, dict[str, float]], None]
) -> tuple[dict[str, Series], list[str]]:
    """The series, and what failed."""
    spawn = multiprocessing.get_context("spawn")
    series: dict[str, Series] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(appendonly=True) as server:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        root = Path(folder) / "models"
        knobs = "lanes = 1\nmax_batch_size = 8\nwarm_up = false"
        fake_model(root, "m", knobs=knobs, fake="delay_ms = 2")
        fake_model(root, "slow", knobs=knobs, fake="delay_ms = 20")
        fake_model(root, "wide", knobs=knobs, fake="delay_ms = 5", width=WIDE)
        env = {"INFERQ_RESULT_EXPIRES_S": str(RESULT_EXPIRES_S)}
        with Worker(server.url, root, env=env) as worker, redis.Redis.from_url(server.url) as store:
            ending, failures = spawn.Event(), spawn.Queue()
            client = spawn.Process(
                target=load, args=(server.url, rate, ending, failures), daemon=True
            )
            client.start()
            try:
                began = time.monotonic()
                while (passed := time.monotonic() - began) < seconds:
                    if client.exitcode is not None or not worker.alive:
                        problems.append("worker or client ended early")
                        break
                    now = sample(worker.pid, client.pid or 0, store)
                    for name, value in now.items():
                        series.setdefault(name, Series()).values.append(value)
                    on_sample(passed, now)
                    time.sleep(1.0)
            finally:
                ending.set()
                client.join(60)
                if client.exitcode is None:
                    client.kill()
            while not failures.empty():
                problems.append(failures.get(timeout=5))
    return series, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=150.0)
    args = parser.parse_args()
    seconds = args.minutes * 60
    console = Console()
    columns = (
        TextColumn("soak"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds, now="")

        def show(passed: float, now: dict[str, float]) -> None:
            told = f"worker {now['worker MB']:.0f} MB, Redis {now['Redis keys']:.0f} keys"
            progress.update(task, completed=passed, now=told)

        series, problems = soak(seconds, args.rate, show)
    table = Table("", "third quarter", "last quarter", "")
    grown = [name for name, each in series.items() if each.grew(ALLOWED[name])]
    for name, each in series.items():
        before, after = each.quarters()
        table.add_row(name, f"{before:.1f}", f"{after:.1f}", "grew" if name in grown else "flat")
    console.print(table)
    for problem in problems[:10]:
        console.print(problem, markup=False)
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    figures = {name: each.values for name, each in series.items()}
    (folder / "soak.json").write_text(json.dumps(figures))
    console.print(f"grew {len(grown)} failed {len(problems)}")
    return 1 if grown or problems or not series else 0


if __name__ == "__main__":
    sys.exit(main())
