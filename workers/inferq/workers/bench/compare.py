"""Compares two runs: each step of the newer with that of the older."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from inferq.shared.errors import ConfigError
from inferq.workers.bench.figures import Report, StepFigures


@dataclass(frozen=True)
class Ratio:
    """For one load: newer ÷ older; None if one of them has no figure."""

    load: float
    requests_per_s: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    queue: float | None
    compute: float | None
    generator_cpu: float | None

    def values(self) -> tuple[float | None, ...]:
        """All but the load."""
        return astuple(self)[1:]


def check_comparable(older: Report, kind: str, what: str) -> None:
    """ConfigError unless the loads of `older` are of `kind`. `what`: its name in the message."""
    if older.how.kind != kind:
        raise ConfigError(f"{what} is of a run by {older.how.kind}; expected one by {kind}")


def ratios(newer: Report, older: Report) -> list[Ratio]:
    """For each load that both have, in the newer's order. A trace is compared with a trace."""
    before = {step.load: step for step in older.steps}
    if newer.how.kind == "trace" and older.steps:
        before = {step.load: older.steps[0] for step in newer.steps}
    return [_ratio(step, before[step.load]) for step in newer.steps if step.load in before]


def differences(newer: Report, older: Report) -> list[str]:
    """Other differences between the two runs, which may explain the ratios."""
    pairs: list[tuple[str, object, object]] = [
        ("model", older.model, newer.model),
        ("model's version", older.version, newer.version),
        ("engine", older.engine, newer.engine),
        ("rows a request", older.request.rows, newer.request.rows),
        ("bytes a request", older.request.bytes, newer.request.bytes),
        ("distribution", older.how.distribution, newer.how.distribution),
        ("host", older.host, newer.host),
        ("cores", older.cores, newer.cores),
        ("inferq", older.versions.get("inferq"), newer.versions.get("inferq")),
        ("server", older.versions.get("server"), newer.versions.get("server")),
    ]
    found = [f"{name}: {old} before, {new} now" for name, old, new in pairs if old != new]
    missing = {step.load for step in newer.steps} - {step.load for step in older.steps}
    if missing and newer.how.kind != "trace":
        found.append(f"not measured before: {', '.join(f'{load:g}' for load in sorted(missing))}")
    return found


def _ratio(now: StepFigures, before: StepFigures) -> Ratio:
    new, old = _figures(now), _figures(before)
    values = [a / b if a and b else None for a, b in zip(new, old, strict=True)]
    return Ratio(now.load, *values)


def _figures(step: StepFigures) -> Sequence[float | None]:
    latency, split = step.latency_ms, step.time_ms
    return (
        step.requests_per_s,
        latency.p50 if latency else None,
        latency.p95 if latency else None,
        latency.p99 if latency else None,
        split.queue if split else None,
        split.compute if split else None,
        step.generator_cpu_us,
    )
