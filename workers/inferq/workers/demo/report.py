"""A run's figures as tables, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from inferq.producer.examples.orientation import DEGREES
from inferq.workers.demo.files import Files
from inferq.workers.demo.photos import JUDGED, SHOWN, Photos, expected
from inferq.workers.demo.stats import Figures

#: Rows of the table of file types; the rest is one row.
_TYPES_SHOWN: Final = 20
_BAR_CELLS: Final = 40


def tables(
    files: Files, photos: Photos, whole: Figures, parts: Mapping[str, Figures]
) -> list[RenderableType]:
    """All that ``inferq demo`` prints at its end. `parts`: model → its figures."""
    return [
        _types(files),
        _rotations(photos),
        _figures(whole, parts),
        *(_batches(model, figures) for model, figures in parts.items()),
    ]


def as_json(
    files: Files, photos: Photos, whole: Figures, parts: Mapping[str, Figures]
) -> dict[str, Any]:
    """The same figures. `rotations`: degrees turned → class answered, for the judged crops."""
    answers = sorted(photos.middles[JUDGED].items())
    return {
        **whole.as_json(),
        "rotations": {str(DEGREES[quarters]): answer.answered for quarters, answer in answers},
        "models": {model: figures.as_json() for model, figures in parts.items()},
        "files": {
            "types": dict(files.types.most_common()),
            "without_model": files.without_model,
            "unreadable": files.unreadable,
        },
        "photos": {
            photo: {str(DEGREES[turn]): asdict(answer) for turn, answer in sorted(middle.items())}
            for photo, middle in photos.middles.items()
        },
    }


def _titled(title: str, table: Table) -> Group:
    """A table with a title that is not broken at the table's width, as rich's own is."""
    return Group(Text(title, "bold"), table)


def _types(files: Files) -> Group:
    found = files.types.total()
    notes = f"{files.without_model} too short to ask about, {files.unreadable} unreadable"
    table = Table()
    table.add_column("type")
    table.add_column("files", justify="right")
    table.add_column("share", justify="right")
    common = files.types.most_common()
    shown, others = common[:_TYPES_SHOWN], common[_TYPES_SHOWN:]
    if others:
        shown.append((f"{len(others)} other types", sum(count for _, count in others)))
    for name, count in shown:
        table.add_row(name, str(count), f"{100 * count / found:.1f} %")
    return _titled(f"What type is each file? {found} files, {notes}", table)


def _rotations(photos: Photos) -> Group:
    table = Table()
    table.add_column("turned by", justify="right")
    for heading in (
        "expected",
        f"{JUDGED}.jpg, middle",
        f"{JUDGED}.jpg, all crops right",
        f"{SHOWN}.jpg (no clear up)",
    ):
        table.add_column(heading)
    for quarters, degrees in enumerate(DEGREES):
        right = expected(quarters)
        asked = sum(n for (turned, _), n in photos.crops.items() if turned == quarters)
        table.add_row(
            f"{degrees}°",
            str(right),
            _answer(photos, JUDGED, quarters, right),
            f"{photos.crops[quarters, right]} of {asked}",
            _answer(photos, SHOWN, quarters, None),
        )
    return _titled("Which way up is the photo?", table)


def _answer(photos: Photos, photo: str, quarters: int, right: int | None) -> RenderableType:
    answer = photos.middles[photo].get(quarters)
    if answer is None:
        return Text("no answer", "red")
    text = f"{answer.answered}, {answer.confidence:.2f}"
    if right is None:
        return Text(text, "dim")
    return Text(text, "green" if answer.answered == right else "red")


def _figures(whole: Figures, parts: Mapping[str, Figures]) -> Group:
    table = Table()
    table.add_column("")
    columns = [*parts.values(), whole]
    for heading in (*parts, "all"):
        table.add_column(heading, justify="right")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    row("requests", [str(figures.requests) for figures in columns])
    row("errors", [_errors(figures) for figures in columns])
    row("requests/s", [f"{figures.rps:.1f}" for figures in columns])
    for name in ("p50", "p95", "p99"):
        row(f"latency {name}, ms", [_ms(figures.latency_ms, name) for figures in columns])
    table.add_section()
    for name, label in (
        ("queue", "mean ms in queue"),
        ("compute", "mean ms computing"),
        ("rest", "mean ms, the rest"),
        ("forming", "  of it forming batches"),
        ("settling", "  of it settling"),
    ):
        row(label, [_ms(figures.time_ms, name) for figures in columns])
    return _titled("Requests, and where their time went", table)


def _errors(figures: Figures) -> str:
    codes = ", ".join(f"{count} {code}" for code, count in figures.error_codes.items())
    return f"[red]{codes}[/red]" if codes else "0"


def _ms(values: object | None, name: str) -> str:
    return "-" if values is None else f"{getattr(values, name):.1f}"


def _batches(model: str, figures: Figures) -> Group:
    table = Table()
    table.add_column("rows", justify="right")
    table.add_column("batches", justify="right")
    table.add_column("")
    most = max(figures.batch_sizes.values(), default=1)
    for size, count in figures.batch_sizes.items():
        table.add_row(str(size), str(count), "█" * max(1, round(_BAR_CELLS * count / most)))
    return _titled(f"Batches of {model}", table)
