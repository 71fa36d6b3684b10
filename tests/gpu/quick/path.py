"""Producers → Valkey → a worker on the card → results: how many rows a second, at what CPU.

A kernel of 1 ms that fills the card stands for the model, rows are pictures of 150 KB. One producer
first, then three, each a process with so many requests in flight.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from helpers.worker import Worker

from gpu.checks import Expected
from gpu.quick.busy import install_engine, pictures, write_model
from gpu.quick.driver import is_fake
from gpu.quick.report import Report
from inferq.producer import Client
from inferq.shared.schema import Array, Tensors
from inferq.workers.process.embedded import EmbeddedRedis

IN_FLIGHT: Final = 256
#: Answers of each producer that are looked at.
CHECKED: Final = 1000
_PICTURES: Final = 64
PRODUCERS: Final = (1, 3)
MODEL: Final = "busy"
_S: Final = 6.0
_TOML: Final = "max_batch_size = 64\n[busy]\nus = 1000.0\n"


def run(report: Report) -> None:
    """One producer, then three."""
    with tempfile.TemporaryDirectory(prefix="inferq-quick-") as name:
        write_model(Path(name) / "models", MODEL, _TOML)
        site = Path(name) / "site"
        install_engine(site)
        measure(report, Path(name) / "models", MODEL, site, 1.5 if is_fake() else _S)


def measure(
    report: Report,
    models: Path,
    model: str,
    site: Path | None,
    seconds: float,
    expected: Expected | None = None,
) -> None:
    """Serve `model` of the repository `models`. SystemExit: a row was another row's.

    `expected`: what is sent and has to come; without it, pictures as `busy` answers them.
    """
    env = {} if site is None else {"PYTHONPATH": with_site(site)}
    flows: list[dict[str, Any]] = []
    with EmbeddedRedis() as redis, Worker(redis.url, models, [model], env=env) as worker:
        for producers in PRODUCERS:
            before = cpu_s(worker.pid), cpu_s(redis.pid)
            flow = _flow(redis.url, model, producers, seconds, expected)
            worker_s, redis_s = cpu_s(worker.pid) - before[0], cpu_s(redis.pid) - before[1]
            flow["worker_cpu_us_per_row"] = worker_s / flow["rows"] * 1e6
            flow["redis_cpu_us_per_row"] = redis_s / flow["rows"] * 1e6
            flows.append(flow)
            report.add(**{model: flows})
            report.say(
                f"{model}, {producers} producers: {flow['rows_per_s']:.0f} rows/s, batches of "
                f"{flow['batch']:.1f}, worker {flow['worker_cpu_us_per_row']:.0f} us a row"
            )
    if wrong := sum(flow["wrong_rows"] for flow in flows):
        raise SystemExit(f"{wrong} rows were another row's")


def with_site(site: Path) -> str:
    """A worker's PYTHONPATH with the folder `site` first."""
    return os.pathsep.join([str(site), *filter(None, sys.path)])


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _flow(
    url: str, model: str, producers: int, seconds: float, expected: Expected | None
) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    started = [
        spawn.Process(
            target=_produce, args=(url, model, seconds, expected, seed, found), daemon=True
        )
        for seed in range(producers)
    ]
    for process in started:
        process.start()
    got = [found.get(timeout=seconds + 30) for _ in started]
    for process in started:
        process.join(10)
    rows = sum(each["rows"] for each in got)
    batches = sum(each["batches"] for each in got)
    return {
        "producers": producers,
        "rows": rows,
        "rows_per_s": sum(each["rows_per_s"] for each in got),
        "batch": rows / batches,
        "gpu_compute_ms": sum(each["compute_ms"] for each in got) / batches,
        "producer_cpu_us_per_row": sum(each["cpu_s"] for each in got) / rows * 1e6,
        "wrong_rows": sum(each["wrong_rows"] for each in got),
    }


def _produce(
    url: str, model: str, seconds: float, expected: Expected | None, seed: int, found: Any
) -> None:
    """As many as are answered, for `seconds`; the first `CHECKED` of what comes is looked at."""
    parts: Sequence[Mapping[str, Array]] = pictures(_PICTURES, first=30 * seed).parts
    if expected is not None:
        parts = expected.rows
    rows, wrong, batches, compute = 0, 0, 0.0, 0.0
    with Client(url) as client:
        client.infer(model, dict(parts[0]), timeout=30)
        began, cpu = time.monotonic(), time.process_time()

        def inputs() -> Iterator[Tensors]:
            n = 0
            while time.monotonic() - began < seconds:
                yield dict(parts[n % len(parts)])
                n += 1

        for result in client.map(model, inputs(), in_flight=IN_FLIGHT):
            if rows < CHECKED:
                wrong += not _is_right(expected, parts, rows % len(parts), result.outputs)
            rows += 1
            assert result.receipt is not None
            batches += 1 / result.receipt.batch_size
            compute += (result.receipt.gpu_compute_ms or 0.0) / result.receipt.batch_size
        took, cpu = time.monotonic() - began, time.process_time() - cpu
    found.put(
        {
            "rows": rows,
            "rows_per_s": rows / took,
            "batches": batches,
            "compute_ms": compute,
            "cpu_s": cpu,
            "wrong_rows": wrong,
        }
    )


def _is_right(
    expected: Expected | None,
    parts: Sequence[Mapping[str, Array]],
    n: int,
    given: Mapping[str, Array],
) -> bool:
    if expected is None:
        return float(given["y"][0, 0]) == float(parts[n]["x"][0, 0])
    right = {name: array[[n]] for name, array in expected.answers.items()}
    return expected.error(given, right) <= expected.limit
