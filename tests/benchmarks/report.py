"""The figures as a table on the terminal, a picture, and build/bench.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Figures = dict[str, Any]


def print_tables(figures: Figures, console: Console) -> None:
    """Every figure of the sections that were measured."""
    if "noop" in figures:
        console.print(_noop_table(figures))
    if "latency" in figures:
        console.print(_latency_table(figures["latency"]))
    if "models" in figures:
        console.print(_models_table(figures["models"]))


def _noop_table(figures: Figures) -> Table:
    table = Table(title="No-op requests, first push to last array; CPU µs a request")
    table.add_column("system", no_wrap=True)
    columns = ("req/s", "×Celery", "µs producer", "worker", "Redis", "total")
    for column in columns:
        table.add_column(column, justify="right")
    rows = {f"inferq, batch {size}": entry for size, entry in figures["noop"].items()}
    rows["inferq, 150 KB"] = figures["payload_150k"]
    for name, entry in {**rows, **figures["baselines"]}.items():
        ratio = entry.get("ratio_plain_celery")
        cpu = [f"{entry['cpu_us'][part]:,.0f}" for part in ("producer", "worker", "redis", "total")]
        table.add_row(name, f"{entry['rps']:,.0f}", f"{ratio:.1f}" if ratio else "", *cpu)
    return table


def _latency_table(latency: Figures) -> Table:
    table = Table(title="Latency at rest, 3 KB")
    for column in ("system", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, entry in latency.items():
        if isinstance(entry, dict):
            table.add_row(name, f"{entry['p50_ms']:.2f}", f"{entry['p99_ms']:.2f}")
    ratios = (f"{latency[key]:.2f}" for key in ("p50_ratio", "p99_ratio"))
    table.add_row("inferq ÷ best plain Celery", *ratios)
    return table


def _models_table(models: Figures) -> Table:
    table = Table(title="Real models against the engine's ceiling in process")
    columns = ("model", "in flight", "requests/s", "of the ceiling", "p50 ms", "p99 ms")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for model, entry in models.items():
        for in_flight, served in entry["served"].items():
            table.add_row(
                model,
                in_flight,
                f"{served['rps']:,.0f}",
                f"{served['efficiency']:.3f}",
                f"{served['p50_ms']:.0f}",
                f"{served['p99_ms']:.0f}",
            )
        for way, rps in entry["ceilings"].items():
            table.add_row(f"  in process: {way}", "", f"{rps:,.0f}", "", "", "")
    return table


def write_picture(figures: Figures, path: Path) -> None:
    """Requests/s and CPU of the no-op systems, and the models' share of their ceiling."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    if "noop" in figures:
        small = {n: e for n, e in figures["baselines"].items() if not n.endswith("150k")}
        entries = {**small, **{f"inferq {n}": e for n, e in figures["noop"].items()}}
        names = list(entries)
        axes[0].barh(names, [entry["rps"] for entry in entries.values()])
        axes[0].set(title="no-op requests/s, 3 KB")
        left = [0.0] * len(names)
        for part in ("producer", "worker", "redis"):
            width = [entry["cpu_us"][part] for entry in entries.values()]
            axes[1].barh(names, width, left=left, label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes[1].set(title="CPU µs a request")
        axes[1].legend()
    if "models" in figures:
        shares = {
            f"{model}, {n} in flight": served["efficiency"]
            for model, entry in figures["models"].items()
            for n, served in entry["served"].items()
        }
        axes[2].barh(list(shares), list(shares.values()))
        axes[2].axvline(1.0, linestyle="--")
        axes[2].set(title="share of the engine's ceiling", xlim=(0, 1.1))
    figure.savefig(path, dpi=110)


def write_json(figures: Figures, path: Path) -> None:
    """The figures as they are, rounded to what they are worth."""
    path.write_text(json.dumps(_rounded(figures), indent=2) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
