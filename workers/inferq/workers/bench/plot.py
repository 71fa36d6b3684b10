"""Draws a run: latency over throughput, and where the time of a request went."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from inferq.workers.bench.figures import Percentiles, Report, StepFigures
from inferq.workers.bench.loads import kind_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Markers distinguish them even without colours.
_CURVES: Final = (("p50", "o", "#0072b2"), ("p95", "s", "#e69f00"), ("p99", "^", "#d55e00"))
#: Of `Times`, from the bottom up: name there, in the legend, colour.
_PARTS: Final = (
    ("late", "late: due until sent", "#999999"),
    ("queue", "queue: sent until claimed", "#56b4e9"),
    ("form", "form: claimed until a lane runs it", "#0072b2"),
    ("compute", "compute: the engine", "#009e73"),
    ("settle", "settle: until the result is stored", "#f0e442"),
    ("other", "other: Redis, network, client", "#cc79a7"),
)
#: Ratio of latencies from which on their axis is logarithmic.
_WIDE: Final = 20
#: Most loads whose names are written at their points and bars.
_NAMED: Final = 24
#: Height of the bars' panel over the highest: there is the legend.
_HEADROOM: Final = 1.22
_INCHES: Final = (12.0, 5.6)
_DPI: Final = 100


def draw(report: Report, older: Report | None = None) -> bytes:
    """The PNG; `older` is drawn dashed."""
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _curves(left, report, older)
    _bars(right, report)
    figure.suptitle(_title(report), fontsize=13, fontweight="bold")
    figure.supxlabel(_origin(report, older), fontsize=8, color="#555555")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _title(report: Report) -> str:
    rows = report.request.rows
    each = f"{rows} row{'' if rows == 1 else 's'} a request"
    return f"{report.model} version {report.version} on {report.engine}, {each}"


def _origin(report: Report, older: Report | None) -> str:
    versions = report.versions
    when = report.began_at.replace("T", " ").replace("+00:00", " UTC")
    lines = [
        f"{when} · inferq {versions.get('inferq')}, Python {versions.get('python')}, "
        f"{versions.get('server')} · {report.cores} cores, shared with the load generator "
        "if the worker runs on the same machine"
    ]
    if older is not None:
        when = older.began_at.replace("T", " ").replace("+00:00", " UTC")
        lines.append(f"dashed: {older.model}, {when}, inferq {older.versions.get('inferq')}")
    return "\n".join(lines)


def _answered(report: Report) -> list[tuple[StepFigures, Percentiles]]:
    return [(step, step.latency_ms) for step in report.steps if step.latency_ms is not None]


def _curves(axes: Axes, report: Report, older: Report | None) -> None:
    points = _answered(report)
    old = _answered(older) if older is not None else []
    for name, marker, colour in _CURVES:
        axes.plot(
            [step.requests_per_s for step, _ in points],
            [getattr(latency, name) for _, latency in points],
            marker=marker,
            color=colour,
            label=name,
            markersize=5,
        )
        if old:
            axes.plot(
                [step.requests_per_s for step, _ in old],
                [getattr(latency, name) for _, latency in old],
                marker=marker,
                color=colour,
                label=f"{name} before",
                markersize=4,
                linestyle="--",
                alpha=0.6,
                markerfacecolor="none",
            )
    every = [latency for _, latency in points + old]
    if every and max(one.p99 for one in every) > _WIDE * min(one.p50 for one in every):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    rates = {step.requests_per_s for step, _ in points + old}
    if len(rates) > 1:
        axes.set_xlim(0, 1.08 * max(rates))
    if len(points) <= _NAMED:
        _name_points(axes, points)
    what = kind_title(report.how.kind)
    axes.set(
        title=f"Latency over throughput (numbers: {what})",
        xlabel="throughput, requests/s",
        ylabel="latency from the intended send time, ms",
    )
    axes.grid(alpha=0.3, which="both")
    if points:
        axes.legend(loc="upper left")


def _name_points(axes: Axes, points: Sequence[tuple[StepFigures, Percentiles]]) -> None:
    for step, latency in points:
        axes.annotate(
            f"{step.load:g}" + ("" if step.stable else "*"),
            (step.requests_per_s, latency.p99),
            xytext=(-3, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )


def _bars(axes: Axes, report: Report) -> None:
    steps = [(step, step.time_ms) for step in report.steps if step.time_ms is not None]
    labels = [f"{step.load:g}" + ("" if step.stable else "*") for step, _ in steps]
    places = range(len(steps))
    bottom = [0.0] * len(steps)
    for name, meaning, colour in _PARTS:
        heights = [max(0.0, getattr(split, name)) for _, split in steps]
        axes.bar(
            places,
            heights,
            bottom=bottom,
            color=colour,
            label=meaning,
            width=0.7,
            edgecolor="white",
            linewidth=0.4,
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(places, labels, rotation=0 if len(steps) <= 10 else 60)
    unstable = "" if all(step.stable for step in report.steps) else "; *: not stable"
    axes.set(
        title="Where the time of an answered request went",
        xlabel=f"load: {kind_title(report.how.kind)}{unstable}",
        ylabel="mean, ms",
    )
    if len(steps) == 1:
        axes.set_xlim(-1, 1)
    axes.set_ylim(0, (max(bottom, default=0.0) or 1.0) * _HEADROOM)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if steps:
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], loc="upper center", fontsize=8, ncols=2)
