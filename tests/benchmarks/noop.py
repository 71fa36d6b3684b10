"""No-op requests: what the way through the queue costs when the model costs nothing.

inferq echoes on its `fake` engine, Celery in a task. A run lasts from the first push to the last
array. Every system runs in every round; requests a run are chosen so that each takes a second or
two, long enough for CPU times that the kernel counts in hundredths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Sample, interleave, medians
from benchmarks.stage import Stage, StockServed, Work
from inferq.producer import Client
from inferq.shared.schema import Array

BATCHES = (1, 8, 32, 128)
BATCHES_OF_CELERY_BATCHES = (8, 32, 128)
POOLS = ("solo", "prefork")
#: float32 elements of a row: 3 KB and 150 KB.
SMALL, LARGE = 768, 38_400
LARGE_BATCH = 8
#: Requests of one run.
COUNTS = {1: 8_000, 8: 25_000, 32: 40_000, 128: 50_000}
LARGE_COUNT = 2_500
STOCK_COUNT, STOCK_LARGE_COUNT = 1_500, 400
WARM_UP_COUNT = 64

MODEL_TOML = """\
engine = "fake"
max_batch_size = {batch}

[fake]
inputs = [{{ name = "x", dtype = "float32", shape = ["batch", {width}] }}]
"""


def small_model(batch: int) -> str:
    """The no-op model of 3 KB rows and this `max_batch_size`."""
    return f"noop{batch}"


LARGE_MODEL = "noop150k"


def write_models(folder: Path) -> None:
    """Lay out the no-op models as a model repository in `folder`."""
    tables = {small_model(batch): (batch, SMALL) for batch in BATCHES}
    tables[LARGE_MODEL] = (LARGE_BATCH, LARGE)
    for model, (batch, width) in tables.items():
        (folder / model).mkdir(parents=True)
        toml = MODEL_TOML.format(batch=batch, width=width)
        (folder / model / "model.toml").write_text(toml)


def echo(client: Client, model: str, in_flight: int) -> Work:
    """`Client.map` over `count` requests; ValueError if an answer is missing or wrong."""

    def work(array: Array, count: int) -> None:
        items = ({"x": array} for _ in range(count))
        read = 0
        for result in client.map(model, items, in_flight=in_flight):
            if result.outputs["x"].shape != array.shape:
                raise ValueError(f"{model} answered shape {result.outputs['x'].shape}")
            read += 1
        if read != count:
            raise ValueError(f"{model} answered {read} requests; expected {count}")

    return work


def run(stage: Stage, models: Path, rounds: int, scale: float) -> dict[str, Any]:
    """Measure everything; `scale` shortens the runs. Keys as in build/bench.json."""
    small, large = (np.ones((1, width), np.float32) for width in (SMALL, LARGE))
    systems: dict[str, Callable[[], Sample]] = {}

    def add(name: str, work: Work, array: Array, count: int, pid: int) -> None:
        work(array, WARM_UP_COUNT)
        systems[name] = lambda: stage.measure(work, array, max(64, int(count * scale)), pid)

    for batch in BATCHES:
        served = stage.serve(models, small_model(batch))
        work = echo(served.client, small_model(batch), max(256, 4 * batch))
        add(f"inferq {batch}", work, small, COUNTS[batch], served.pid)
    served = stage.serve(models, LARGE_MODEL)
    work = echo(served.client, LARGE_MODEL, 64)
    add("inferq 150k", work, large, LARGE_COUNT, served.pid)
    for pool in POOLS:
        stock = stage.plain_celery(pool)
        for how, work in _ways(stock).items():
            add(f"celery {pool} {how}", work, small, STOCK_COUNT, stock.pid)
            add(f"celery {pool} {how} 150k", work, large, STOCK_LARGE_COUNT, stock.pid)
    for batch in BATCHES_OF_CELERY_BATCHES:
        stock = stage.celery_batches(batch)
        many = stock.client.run_get_many
        add(f"celery-batches {batch}", many, small, STOCK_COUNT, stock.pid)
    samples = interleave(systems, rounds)
    return summarise({name: medians(runs) for name, runs in samples.items()})


def _ways(stock: StockServed) -> dict[str, Work]:
    return {"get": stock.client.run_get, "get_many": stock.client.run_get_many}


def summarise(figures: Mapping[str, Sample]) -> dict[str, Any]:
    """The figures of all systems, by the names that `run` gives them, as in build/bench.json."""

    def best(large: bool) -> float:
        """Requests/s of plain Celery's fastest pool and way of reading."""
        stock = [n for n in figures if n.startswith("celery ") and n.endswith(" 150k") == large]
        return max(figures[name].rps for name in stock)

    def entry(sample: Sample, plain: float) -> dict[str, Any]:
        ratio = sample.rps / plain
        return {"rps": sample.rps, "ratio_plain_celery": ratio, "cpu_us": sample.cpu_us}

    baselines = {name: s for name, s in figures.items() if not name.startswith("inferq ")}
    return {
        "noop": {str(b): entry(figures[f"inferq {b}"], best(large=False)) for b in BATCHES},
        "payload_150k": entry(figures["inferq 150k"], best(large=True)),
        "baselines": {
            name: {"rps": sample.rps, "cpu_us": sample.cpu_us} for name, sample in baselines.items()
        },
    }
